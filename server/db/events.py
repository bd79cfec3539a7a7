"""Statements on events: what happened to a job, in words and in order."""

import time
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from server.db.pages import Page, fetch_page
from server.db.tables import Event, Job


def record(session: Session, job: Job, kind: str, message: str, data: dict[str, Any] | None = None) -> None:
    """Add an event to a job's history, in the caller's transaction. `kind` is a stable word for programs."""
    session.add(
        Event(
            tenant_id=job.tenant_id,
            job_id=job.id,
            kind=kind,
            message=message,
            data=data or {},
            created_at=time.time(),
        )
    )


def list_events(session: Session, job: Job, page: Page) -> tuple[list[Event], bool]:
    """A page of a job's events, and whether more follow."""
    scope = select(Event).where(Event.tenant_id == job.tenant_id, Event.job_id == job.id)
    return fetch_page(session, scope, page, identity=Event.id, order=(Event.id,))
