"""Statements on tenants."""

import time
from collections.abc import Sequence

from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from server.db import accounts, seats
from server.db.pages import Listing, Page
from server.db.session import one_at_a_time, rows
from server.db.tables import Tenant
from server.errors import MixloomError, invalid_api_key
from server.ids import new_id

_SCOPE = select(Tenant).where(Tenant.deleted_at.is_(None))
_HELD = (
    _SCOPE.with_only_columns(Tenant.id)
    .where(Tenant.id == bindparam("tenant_id"))
    .with_for_update(read=True, key_share=True)  # which lets a new share pass
)
_TENANTS = Listing(_SCOPE, identity=Tenant.id, order=(Tenant.created_at, Tenant.id))
_WITH_DELETED = Listing(select(Tenant), identity=Tenant.id, order=(Tenant.created_at, Tenant.id))


def add_tenant(session: Session, name: str, share: float) -> Tenant:
    """A new tenant. Raises `name_taken`."""
    _refuse_taken(session, name)
    tenant = Tenant(id=new_id("ten"), name=name, share=share, created_at=time.time())
    session.add(tenant)
    session.flush()
    seats.add_counters(session, tenant.id)
    return tenant


def get_tenant(session: Session, tenant_id: str) -> Tenant:
    """Raises 404 for a tenant that never was, or was deleted."""
    tenant = session.scalar(_SCOPE.where(Tenant.id == tenant_id))
    if tenant is None:
        raise MixloomError("not_found", f"There is no tenant '{tenant_id}'. List them with GET /admin/tenants.", 404)
    return tenant


def hold_tenant(session: Session, tenant_id: str) -> None:
    """It is not deleted until this transaction ends, in which something of it is added. Raises 401 if it was before."""
    if not rows(session, _HELD, {"tenant_id": tenant_id}):
        raise invalid_api_key("The tenant of this key was deleted.")


def find_tenants(session: Session, ids: Sequence[str]) -> dict[str, Tenant]:
    """Those of the given tenants that there are or were, by id."""
    return {tenant.id: tenant for tenant in session.scalars(select(Tenant).where(Tenant.id.in_(ids)))}


def list_with_deleted(session: Session, page: Page) -> tuple[list[Tenant], bool]:
    """A page of all tenants that there are or were, and whether more follow."""
    return _WITH_DELETED.page(session, page)


def list_tenants(session: Session, page: Page, filters: Sequence[object] = ()) -> tuple[list[Tenant], bool]:
    """A page of the tenants, and whether more follow."""
    return _TENANTS.page(session, page, filters=filters)


def change_tenant(session: Session, tenant: Tenant, *, name: str | None, share: float | None) -> None:
    """Set what is given; a new share counts from now on. Raises `name_taken`."""
    session.refresh(tenant, with_for_update={"key_share": True})
    if name is not None and name != tenant.name:
        _refuse_taken(session, name)
        tenant.name = name
    if share is not None:
        accounts.reweight(session, tenant.id, before=tenant.share, after=share)
        tenant.share = share


def delete_tenant(session: Session, tenant: Tenant) -> None:
    """It is as if it never was, and its name is free; its rows stay for the books.

    What was being added for it (`hold_tenant`) is there when this returns, and nothing comes after.
    """
    session.refresh(tenant, with_for_update=True)
    tenant.deleted_at = time.time()


def _refuse_taken(session: Session, name: str) -> None:
    one_at_a_time(session, "tenants")
    if session.scalar(_SCOPE.where(Tenant.name == name)) is not None:
        raise MixloomError("name_taken", f"There is a tenant named '{name}' already. Choose another name.", 422, "name")
