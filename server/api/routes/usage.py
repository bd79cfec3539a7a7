"""What tenants have used, in tokens. What a restart makes train again counts once."""

from collections.abc import Mapping
from typing import Any

from server.api.deps import AdminDep, ServicesDep, TenantDep
from server.api.lists import PageDep, list_answer
from server.api.routing import new_router
from server.db import accounts, tenants
from server.db.accounts import Usage
from server.db.tables import Tenant

router = new_router(tag="usage")


@router.get("/usage")
def get_usage(services: ServicesDep, tenant: TenantDep) -> dict[str, Any]:
    """The tokens of your steps, prompts and answers so far, also of what you have deleted."""
    with services.database.read() as session:
        found = tenants.get_tenant(session, tenant.tenant_id)
        return _usage_answer(found, accounts.read_usage(session, [found.id]))


@router.get("/admin/usage")
def list_usage(admin: AdminDep, services: ServicesDep, page: PageDep) -> dict[str, Any]:
    """That of every tenant, newest first unless `order=asc`; also of those that were deleted."""
    with services.database.read() as session:
        found, has_more = tenants.list_with_deleted(session, page)
        used = accounts.read_usage(session, [tenant.id for tenant in found])
    return list_answer([_usage_answer(tenant, used) for tenant in found], has_more)


def _usage_answer(tenant: Tenant, used: Mapping[str, Usage]) -> dict[str, Any]:
    return {
        "id": tenant.id,
        "object": "usage",
        "tenant": {"id": tenant.id, "name": tenant.name},
        **vars(used.get(tenant.id, Usage())),
        "deleted_at": tenant.deleted_at,
    }
