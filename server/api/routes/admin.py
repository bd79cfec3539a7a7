"""The operator's view of all tenants together, and the wish that nothing trains."""

from typing import Annotated, Any

from fastapi import Query
from sqlalchemy.orm import Session

from server.api import schemas
from server.api.answers import progress_answer
from server.api.deps import AdminDep, ServicesDep
from server.api.lists import PageDep, list_answer
from server.api.routing import new_router
from server.db import accounts, daemons, drains, jobs, tenants
from server.db.daemons import is_live
from server.db.queue import read_outlook
from server.db.tables import Daemon, Drain, Job, Tenant
from server.errors import MixloomError
from server.outlook import Outlook

router = new_router(prefix="/admin", tag="admin")
EVERYWHERE = schemas.Undrain()


@router.get("/queue")
def list_queue(admin: AdminDep, services: ServicesDep, page: PageDep) -> dict[str, Any]:
    """Every tenant's jobs that have not ended, newest first unless `order=asc`.

    A tenant's `counter` is the one with the daemon that trains the job, or else with the first that may.
    """
    with services.database.read() as session:
        found, has_more = jobs.list_unfinished(session, page)
        owners = tenants.find_tenants(session, [job.tenant_id for job in found])
        counters = accounts.shown_counters(session, [job.id for job in found])
        outlook = read_outlook(session, found)
    return list_answer(
        [_queue_entry(job, owners[job.tenant_id], counters.get(job.id, 0.0), outlook) for job in found], has_more
    )


@router.get("/daemons")
def list_daemons(admin: AdminDep, services: ServicesDep, page: PageDep) -> dict[str, Any]:
    """Lives of engine daemons, newest first unless `order=asc`."""
    with services.database.read() as session:
        found, has_more = daemons.list_daemons(session, page)
        at = daemons.read_clock(session)
        return list_answer([_daemon_answer(session, daemon, at) for daemon in found], has_more)


@router.post("/drain", status_code=201)
def drain(admin: AdminDep, services: ServicesDep, body: schemas.DrainCreate) -> dict[str, Any]:
    """Let nothing train until undrain, or nothing in one daemon.

    It takes the place of the drain in force for the same daemons, and outlives restarts; one of all and those of single
    daemons stand side by side. `at_rest` says when every run is let go of.
    """
    if body.deadline_seconds is not None and body.mode != "graceful":
        message = f"'deadline_seconds' goes with mode 'graceful'; the mode is '{body.mode}'. Leave it out."
        raise MixloomError("deadline_needs_graceful", message, 422, "deadline_seconds")
    with services.database.write() as session:
        _check_name(session, body.daemon)
        begun = drains.add_drain(
            session,
            mode=body.mode,
            deadline_seconds=body.deadline_seconds,
            reason=body.reason,
            daemon=body.daemon,
            exit_=body.exit,
            created_by="admin",
        )
        return _answer(session, begun)


@router.get("/drain")
def get_drain(
    admin: AdminDep,
    services: ServicesDep,
    daemon: Annotated[
        str | None, Query(description="The one in force for daemons of this name; else for all daemons.")
    ] = None,
) -> dict[str, Any]:
    """The drain in force; `draining` is false when there is none. `named` are those in force of single daemons."""
    with services.database.read() as session:
        _check_name(session, daemon)
        return _answer(session, drains.open_drain(session, daemon))


@router.post("/undrain")
def undrain(admin: AdminDep, services: ServicesDep, body: schemas.Undrain = EVERYWHERE) -> dict[str, Any]:
    """End the drain of all daemons, or that of one. Again is no error.

    The answer is the drain that is still in force there, if any; `named` are those of single daemons.
    """
    with services.database.write() as session:
        _check_name(session, body.daemon)
        drains.end_drains(session, body.daemon)
        return _answer(session, drains.open_drain(session, body.daemon))


def _check_name(session: Session, daemon: str | None) -> None:
    if daemon is not None and not daemons.exists_named(session, daemon):
        message = f"No daemon is called '{daemon}', and none was. GET /admin/daemons shows their names."
        raise MixloomError("unknown_daemon", message, 422, "daemon")


def _queue_entry(job: Job, owner: Tenant, counter: float, outlook: Outlook) -> dict[str, Any]:
    reason = outlook.reason(job.status, job.base_hash, job.reason)
    expected = outlook.expectation(job.tenant_id, job.id, job.base_hash, reason)
    return {
        "id": job.id,
        "object": "queue_entry",
        "tenant": {"id": owner.id, "name": owner.name, "share": owner.share, "counter": counter},
        "name": job.name,
        "status": job.status,
        "requested": job.requested,
        "priority": job.priority,
        "reason": reason,
        "sentence": outlook.sentence(reason, job.base_hash),
        "share": outlook.share(job.tenant_id, job.base_hash),
        "progress": progress_answer(job),
        "estimated_start": expected.start,
        "estimated_finish": expected.finish,
        "created_at": job.created_at,
    }


def _daemon_answer(session: Session, daemon: Daemon, at: float) -> dict[str, Any]:
    live = is_live(daemon, at)
    drain = drains.open_drain(session, daemon.name) if live else None
    return {
        "id": str(daemon.epoch),
        "object": "daemon",
        "name": daemon.name,
        "pid": daemon.pid,
        "base_hash": daemon.base_hash,
        "state": daemon.state,
        "live": live,
        "drain": None if drain is None else _drain_answer(session, drain),
        "detail": daemon.detail,
        "started_at": daemon.started_at,
        "heartbeat_seconds_ago": round(at - daemon.heartbeat_at, 1),
        "ended_at": daemon.ended_at,
    }


def _answer(session: Session, drain: Drain | None) -> dict[str, Any]:
    """A drain, if there is one, and those in force of daemons of one name: whether they still live or not."""
    answer = {"object": "drain", "draining": False} if drain is None else _drain_answer(session, drain)
    named = [_drain_answer(session, one) for one in drains.open_drains(session) if one.daemon is not None]
    return {**answer, "named": named}


def _drain_answer(session: Session, drain: Drain) -> dict[str, Any]:
    return {
        "id": drain.id,
        "object": "drain",
        "draining": True,
        "mode": drain.mode,
        "reason": drain.reason,
        "daemon": drain.daemon,
        "exit": drain.exit,
        "deadline_at": drain.deadline_at,
        "created_by": drain.created_by,
        "created_at": drain.created_at,
        "at_rest": drains.is_at_rest(session, drain),
    }
