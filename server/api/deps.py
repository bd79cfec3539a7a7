"""What a route may ask for, as types: its signature tells what it needs and who may call it.

All are `async`, since FastAPI hands every other dependency to a thread; what may block goes through `in_thread`.
"""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Request

from server.api.auth import hash_of_secret, is_admin_key
from server.api.routing import in_thread
from server.api.services import Services
from server.db import keys
from server.errors import MixloomError, invalid_api_key


@dataclass(frozen=True)
class Tenant:
    """The tenant in whose name a request is made, and the key that it used."""

    tenant_id: str
    key_id: str


@dataclass(frozen=True)
class Admin:
    """The operator."""


async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(_services)]


async def _caller(
    request: Request,
    authorization: Annotated[str | None, Header()] = None,
    x_api_key: Annotated[str | None, Header()] = None,
) -> Tenant | Admin:
    """Who calls, from `Authorization: Bearer KEY` or `X-API-Key: KEY`. Raises 401 `invalid_api_key`."""
    scheme, _, bearer = (authorization or "").partition(" ")
    secret = (bearer if scheme.lower() == "bearer" else x_api_key or "").strip()
    services: Services = request.app.state.services  # a dependency of a dependency is looked up once more each time
    if secret and is_admin_key(secret, services.admin_key_sha256):
        return Admin()
    key = await in_thread(_find_key, services, secret) if secret else None
    if key is None:
        raise invalid_api_key("The key is wrong or was revoked." if secret else "There is no key in the request.")
    key_id, tenant_id = key
    request.state.tenant_id = tenant_id  # for the log
    return Tenant(tenant_id, key_id)


def _find_key(services: Services, secret: str) -> tuple[str, str] | None:
    with services.database.look() as reader:
        return keys.find_valid(reader, hash_of_secret(secret))


CallerDep = Annotated[Tenant | Admin, Depends(_caller)]


async def _tenant(caller: CallerDep) -> Tenant:
    if isinstance(caller, Admin):
        raise MixloomError(
            "tenant_key_required",
            "This route belongs to a tenant, and the admin key to none. Use a tenant's key; "
            "make one with POST /admin/tenants/ID/keys.",
            403,
        )
    return caller


async def _admin(caller: CallerDep) -> Admin:
    if isinstance(caller, Tenant):
        raise MixloomError(
            "admin_key_required", "This route is the operator's. Use the admin key (data_dir/admin.key).", 403
        )
    return caller


async def _room(services: ServicesDep) -> None:
    services.disk.refuse_if_low()


NEEDS_ROOM = Depends(_room)
"""For a route that keeps what it is sent. Raises 507 `disk_full`."""
TenantDep = Annotated[Tenant, Depends(_tenant)]
AdminDep = Annotated[Admin, Depends(_admin)]
