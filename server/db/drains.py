"""Statements on drains: the operator's wish that nothing trains."""

import time

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from server.db.tables import Drain
from server.ids import new_id


def open_drain(session: Session) -> Drain | None:
    """The drain in force."""
    return session.scalar(
        select(Drain).where(Drain.ended_at.is_(None)).order_by(Drain.created_at.desc(), Drain.id).limit(1)
    )


def add_drain(
    session: Session, *, mode: str, deadline_seconds: float | None, reason: str, exit_: bool, created_by: str
) -> Drain:
    """Begin a drain, in place of the one in force."""
    end_drains(session)
    now = time.time()
    drain = Drain(
        id=new_id("drain"),
        mode=mode,
        deadline_at=None if deadline_seconds is None else now + deadline_seconds,
        reason=reason,
        exit=exit_,
        created_by=created_by,
        created_at=now,
        ended_at=None,
    )
    session.add(drain)
    session.flush()
    return drain


def end_drains(session: Session) -> None:
    """End every open drain; none is no error."""
    session.execute(update(Drain).where(Drain.ended_at.is_(None)).values(ended_at=time.time()))
