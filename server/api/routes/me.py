"""Who one is."""

from typing import Any

from server.api.deps import Admin, CallerDep, ServicesDep
from server.api.routing import new_router
from server.db import datasets, keys, tenants
from server.settings import MIB

router = new_router(tag="me")


@router.get("/me")
def get_me(services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """The tenant and the key of this request, and what the tenant has of what it may have; null is without a limit."""
    if isinstance(caller, Admin):
        return {"object": "me", "tenant": None, "key": None, "scopes": ["admin"], "share": None, "quotas": None}
    most = services.settings.max_datasets_mib
    with services.database.read() as session:
        tenant = tenants.get_tenant(session, caller.tenant_id)
        key = keys.get_key(session, caller.tenant_id, caller.key_id)
        kept = datasets.kept_bytes(session, caller.tenant_id)
    assert key is not None, "the request was made with it"
    return {
        "object": "me",
        "tenant": {"id": tenant.id, "name": tenant.name},
        "key": {"id": key.id, "name": key.name, "shown": key.shown, "created_at": key.created_at},
        "scopes": ["tenant"],
        "share": tenant.share,
        "quotas": {"dataset_bytes": {"used": kept, "limit": None if most is None else most * MIB}},
    }
