"""The base model in force."""

from typing import Any

from server.api.deps import Admin, CallerDep, ServicesDep
from server.api.routing import new_router
from server.db.bases import current_base
from server.resolve import longest_row

router = new_router(tag="base")


@router.get("/base")
def get_base(services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """What new jobs train on. The operator also sees where it lies."""
    with services.database.read() as session:
        base = current_base(session)
    answer = {
        "object": "base",
        "name": base.name,
        "hash": base.hash,
        "dtype": base.dtype,
        "probe": base.probe,
        "fingerprint": base.fingerprint,
        "parameters": base.parameters,
        "num_layers": base.num_layers,
        "context": base.context,
        "max_row_tokens": longest_row(base),
        "targets": base.targets,
        "published_at": base.published_at,
    }
    return {**answer, "path": base.path} if isinstance(caller, Admin) else answer
