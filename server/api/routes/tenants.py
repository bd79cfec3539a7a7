"""The operator's routes: tenants and their keys."""

from typing import Annotated, Any

from fastapi import Query, Response
from sqlalchemy.orm import Session

from server.api import schemas
from server.api.auth import hash_of_secret, new_secret
from server.api.deps import AdminDep, ServicesDep
from server.api.lists import PageDep, list_answer
from server.api.routing import new_router
from server.db import jobs, keys, tenants
from server.db.tables import Key, Tenant
from server.errors import MixloomError

router = new_router(prefix="/admin/tenants", tag="admin")


@router.post("", status_code=201)
def create_tenant(
    admin: AdminDep, services: ServicesDep, body: schemas.TenantCreate, response: Response
) -> dict[str, Any]:
    """A tenant with its first key, which is shown here and never again."""
    with services.database.write() as session:
        tenant = tenants.add_tenant(session, body.name, body.share)
        _, secret = _add_key(session, tenant, "first key")
    response.headers["Location"] = f"/admin/tenants/{tenant.id}"
    return {**_tenant_answer(tenant), "key": secret}


@router.get("")
def list_tenants(
    admin: AdminDep, services: ServicesDep, page: PageDep, name: Annotated[str | None, Query()] = None
) -> dict[str, Any]:
    """Tenants that were not deleted."""
    with services.database.read() as session:
        found, has_more = tenants.list_tenants(session, page, [] if name is None else [Tenant.name == name])
    return list_answer([_tenant_answer(tenant) for tenant in found], has_more)


@router.get("/{tenant_id}")
def get_tenant(admin: AdminDep, services: ServicesDep, tenant_id: str) -> dict[str, Any]:
    """A tenant and its share."""
    with services.database.read() as session:
        return _tenant_answer(tenants.get_tenant(session, tenant_id))


@router.patch("/{tenant_id}")
def change_tenant(admin: AdminDep, services: ServicesDep, tenant_id: str, body: schemas.TenantUpdate) -> dict[str, Any]:
    """A new share counts from the next gang on."""
    with services.database.write() as session:
        tenant = tenants.get_tenant(session, tenant_id)
        tenants.change_tenant(session, tenant, name=body.name, share=body.share)
        return _tenant_answer(tenant)


@router.delete("/{tenant_id}")
def delete_tenant(admin: AdminDep, services: ServicesDep, tenant_id: str) -> dict[str, Any]:
    """Its keys stop working and its jobs are cancelled. Its name is free again."""
    with services.database.write() as session:
        tenants.get_tenant(session, tenant_id)
        keys.revoke(session, tenant_id)
    with services.database.write() as session:  # requests that come all the time could hold it up for ever
        tenants.delete_tenant(session, tenants.get_tenant(session, tenant_id))
        jobs.cancel_all(session, [tenant_id])
    return {"id": tenant_id, "object": "tenant", "deleted": True}


@router.post("/{tenant_id}/keys", status_code=201)
def create_key(admin: AdminDep, services: ServicesDep, tenant_id: str, body: schemas.KeyCreate) -> dict[str, Any]:
    """Another key, shown here and never again."""
    with services.database.write() as session:
        key, secret = _add_key(session, tenants.get_tenant(session, tenant_id), body.name)
    return {**_key_answer(key), "key": secret}


@router.get("/{tenant_id}/keys")
def list_keys(admin: AdminDep, services: ServicesDep, page: PageDep, tenant_id: str) -> dict[str, Any]:
    """A tenant's keys by their first characters, revoked ones among them."""
    with services.database.read() as session:
        found, has_more = keys.list_keys(session, tenants.get_tenant(session, tenant_id).id, page)
    return list_answer([_key_answer(key) for key in found], has_more)


@router.get("/{tenant_id}/keys/{key_id}")
def get_key(admin: AdminDep, services: ServicesDep, tenant_id: str, key_id: str) -> dict[str, Any]:
    """A key by its first characters, and when it was revoked."""
    with services.database.read() as session:
        return _key_answer(_get_key(session, tenant_id, key_id))


@router.delete("/{tenant_id}/keys/{key_id}")
def revoke_key(admin: AdminDep, services: ServicesDep, tenant_id: str, key_id: str) -> dict[str, Any]:
    """The next request with it is refused. Its row stays: jobs name the key that made them."""
    with services.database.write() as session:
        _get_key(session, tenant_id, key_id)
        keys.revoke(session, tenant_id, key_id)
    return {"id": key_id, "object": "key", "deleted": True}


def _get_key(session: Session, tenant_id: str, key_id: str) -> Key:
    key = keys.get_key(session, tenants.get_tenant(session, tenant_id).id, key_id)
    if key is None:
        raise MixloomError(
            "not_found",
            f"There is no key '{key_id}'. List them with GET /admin/tenants/{tenant_id}/keys.",
            404,
        )
    return key


def _add_key(session: Session, tenant: Tenant, name: str) -> tuple[Key, str]:
    secret = new_secret()
    return keys.add_key(session, tenant.id, name, secret[:8], hash_of_secret(secret)), secret


def _tenant_answer(tenant: Tenant) -> dict[str, Any]:
    return {
        "id": tenant.id,
        "object": "tenant",
        "name": tenant.name,
        "share": tenant.share,
        "created_at": tenant.created_at,
    }


def _key_answer(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "object": "key",
        "tenant_id": key.tenant_id,
        "name": key.name,
        "shown": key.shown,
        "created_at": key.created_at,
        "revoked_at": key.revoked_at,
    }
