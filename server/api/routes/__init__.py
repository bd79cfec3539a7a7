"""One module a noun, as in the URL."""

from server.api.routes import adapters, admin, base, datasets, generate, health, jobs, me, progress, tenants

ROUTERS = [module.router for module in (health, base, me, datasets, jobs, progress, adapters, generate, tenants, admin)]
