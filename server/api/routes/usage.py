"""What tenants have used, in tokens. What a restart makes train again counts once."""

from typing import Any

from server.api.deps import AdminDep, ServicesDep, TenantDep
from server.api.lists import PageDep, list_answer
from server.api.routing import new_router
from server.db import tenants
from server.db.tables import Tenant

router = new_router(tag="usage")


@router.get("/usage")
def get_usage(services: ServicesDep, tenant: TenantDep) -> dict[str, Any]:
    """The tokens of your steps, prompts and answers so far, also of what you have deleted."""
    with services.database.read() as session:
        return _usage_answer(tenants.get_tenant(session, tenant.tenant_id))


@router.get("/admin/usage")
def list_usage(admin: AdminDep, services: ServicesDep, page: PageDep) -> dict[str, Any]:
    """That of every tenant, newest first unless `order=asc`; also of those that were deleted."""
    with services.database.read() as session:
        found, has_more = tenants.list_with_deleted(session, page)
    return list_answer([_usage_answer(tenant) for tenant in found], has_more)


def _usage_answer(tenant: Tenant) -> dict[str, Any]:
    return {
        "id": tenant.id,
        "object": "usage",
        "tenant": {"id": tenant.id, "name": tenant.name},
        "trained_tokens": tenant.trained_tokens,
        "prompt_tokens": tenant.prompt_tokens,
        "sampled_tokens": tenant.sampled_tokens,
        "deleted_at": tenant.deleted_at,
    }
