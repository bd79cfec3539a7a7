"""Statements on events: what happened to a job, in words and in order."""

import time
from typing import Any

from sqlalchemy import bindparam, insert, select
from sqlalchemy.orm import Session

from server.db.pages import Listing, Page
from server.db.session import Reader
from server.db.tables import Event, Job

ADD = insert(Event.metadata.tables["events"])
_OF_JOB = Listing(
    select(Event).where(Event.tenant_id == bindparam("tenant_id"), Event.job_id == bindparam("job_id")),
    identity=Event.id,
    order=(Event.id,),
)


def record(session: Session, job: Job, kind: str, message: str, data: dict[str, Any] | None = None) -> None:
    """Add an event to a job's history, in the caller's transaction. `kind` is a stable word for programs."""
    session.execute(ADD, {"tenant_id": job.tenant_id, "job_id": job.id, **fields(kind, message, data)})


def fields(kind: str, message: str, data: dict[str, Any] | None = None) -> dict[str, Any]:
    """The columns of an event that happens now, but for those that say whose it is."""
    return {"kind": kind, "message": message, "data": data or {}, "created_at": time.time()}


def list_events(reader: Reader, job: Job, page: Page) -> tuple[list[Event], bool]:
    """A page of a job's events, and whether more follow."""
    return _OF_JOB.page(reader, page, {"tenant_id": job.tenant_id, "job_id": job.id})
