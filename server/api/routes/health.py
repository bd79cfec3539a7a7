"""Whether the service lives, and whether it can work. No key is needed."""

from fastapi import Response
from sqlalchemy.exc import SQLAlchemyError

from server.api.deps import ServicesDep
from server.api.routing import new_router
from server.api.services import Services
from server.db.bases import current_base, is_live, newest_daemon
from server.errors import MixloomError

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
            reasons = [] if is_live(newest_daemon(session)) else ["No engine daemon is running."]
            try:
                current_base(session)
            except MixloomError:
                reasons.append("No base model is loaded yet.")
            return reasons
    except SQLAlchemyError as error:
        return [f"The database does not answer: {type(error).__name__}."]
