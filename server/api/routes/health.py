"""Whether the service lives, and whether it can work. No key is needed."""

from fastapi import Response
from sqlalchemy.exc import SQLAlchemyError

from server.api.deps import ServicesDep
from server.api.routing import new_router
from server.api.services import Services
from server.db.bases import find_base
from server.db.daemons import live_daemons

router = new_router(tag="health")


@router.get("/")
def about() -> dict[str, str]:
    """Where a browser that came here finds the rest."""
    return {"name": "mixloom", "docs": "/docs", "openapi": "/openapi.json", "health": "/readyz"}


@router.get("/healthz")
def alive() -> dict[str, str]:
    """200 as long as the API process answers."""
    return {"status": "alive"}


@router.get("/readyz")
def ready(services: ServicesDep, response: Response) -> dict[str, object]:
    """200 when jobs can be submitted and train; 503 with the reasons otherwise."""
    reasons = _missing(services)
    if reasons:
        response.status_code = 503
    return {"status": "not_ready" if reasons else "ready", "reasons": reasons}


def _missing(services: Services) -> list[str]:
    try:
        with services.database.read() as session:
            live = live_daemons(session)
            checks = {
                "No engine daemon is running.": bool(live),
                "The disk is full; jobs wait until it has room.": not (
                    services.disk.is_low or any(daemon.state == "disk_full" for daemon in live)
                ),
                "No base model is loaded yet.": find_base(session) is not None,
            }
        return [reason for reason, is_met in checks.items() if not is_met]
    except SQLAlchemyError as error:
        return [f"The database does not answer: {type(error).__name__}."]
