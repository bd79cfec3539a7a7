"""One module a noun, as in the URL."""

from importlib.util import find_spec

from server.api.routes import health, tenants

ROUTERS = [health.router, tenants.router]
if find_spec("server.api.routes.datasets"):
    from server.api.routes import datasets

    ROUTERS.append(datasets.router)
