"""The API as a whole: opens the database, wires routes, rules and errors together. Runs without torch."""

from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI

from server.admin_key import ensure_admin_key
from server.api.auth import sha256
from server.api.errors import add_error_handlers
from server.api.middleware import BodyRules, RequestLine
from server.api.routes import ROUTERS
from server.api.services import Services
from server.api.waiting import OperationWatch
from server.db.migrate import upgrade
from server.db.session import Database
from server.db.stores import refuse_other_store
from server.disk import Disk
from server.settings import MIB, Settings
from server.store import LocalStore


def open_services(settings: Settings) -> Services:
    """The database of `settings.data_dir`, migrated, and what else requests need. Raises `MixloomError`."""
    upgrade(settings)
    database = Database(settings.database, many_read=True)
    refuse_other_store(settings, database)
    admin_key, written = ensure_admin_key(settings)
    return Services(
        settings=settings,
        database=database,
        store=LocalStore(settings.data_dir),
        disk=Disk(settings),
        operations=OperationWatch(database),
        admin_key_sha256=sha256(admin_key),
        admin_key_written=written,
    )


def create_app(settings: Settings) -> FastAPI:
    """The app over `settings.data_dir`. Raises as `open_services`."""
    app = FastAPI(title="Mixloom", version=_version(), redirect_slashes=False)
    app.state.services = open_services(settings)
    add_error_handlers(app)
    uploads = {"/datasets": settings.max_upload_mib * MIB, "/adapters": settings.max_adapter_mib * MIB}
    app.add_middleware(BodyRules, upload_bytes=uploads)
    app.add_middleware(RequestLine)  # added last: outermost
    for router in ROUTERS:
        app.include_router(router)
    return app


def _version() -> str:
    try:
        return version("mixloom")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "0+checkout"
