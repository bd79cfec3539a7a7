"""One module a noun, as in the URL."""

from server.api.routes import (
    adapters,
    admin,
    base,
    datasets,
    generate,
    health,
    jobs,
    me,
    metrics,
    progress,
    tenants,
    usage,
)

ROUTERS = [
    module.router
    for module in (health, metrics, base, me, datasets, jobs, progress, adapters, generate, usage, tenants, admin)
]
