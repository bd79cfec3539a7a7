"""Statements on drains: the operator's wish that nothing trains, anywhere or in one daemon."""

from collections.abc import Sequence

from sqlalchemy import ColumnElement, select, update
from sqlalchemy.orm import Session

from server.db.daemons import live_daemons, read_clock
from server.db.session import Reader, read_only
from server.db.tables import Drain
from server.ids import new_id

IS_IN_FORCE: ColumnElement[bool] = Drain.ended_at.is_(None)
_OPEN = select(Drain).where(IS_IN_FORCE).order_by(Drain.created_at.desc(), Drain.id)


def open_drains(reader: Reader) -> Sequence[Drain]:
    """Those in force, the newest first."""
    return read_only(reader, _OPEN)


def first_for(drains: Sequence[Drain], daemon: str | None = None) -> Drain | None:
    """The first of those that are for all daemons, or for those of this name."""
    return next((drain for drain in drains if drain.daemon in (None, daemon)), None)


def open_drain(session: Session, daemon: str | None = None) -> Drain | None:
    """The newest drain in force of those that are for all daemons, or for those of this name."""
    return first_for(open_drains(session), daemon)


def asks_to_end(session: Session, daemon: str | None) -> bool:
    """Whether a drain in force wants daemons of this name to end, also where a newer one does not."""
    return any(drain.exit for drain in open_drains(session) if drain.daemon in (None, daemon))


def is_past_deadline(session: Session, drain: Drain) -> bool:
    """Whether it is to go on as a quick one: by the database's clock, which set the deadline."""
    return drain.deadline_at is not None and read_clock(session) > drain.deadline_at


def is_at_rest(session: Session, drain: Drain) -> bool:
    """Whether no live daemon that it is for trains, or will before it has seen the drain."""
    drains = open_drains(session)
    concerned = [one for one in live_daemons(session) if drain.daemon in (None, one.name)]
    in_force = [(one, first_for(drains, one.name)) for one in concerned]
    return all(newest is not None and one.rests_under == newest.id for one, newest in in_force)


def add_drain(
    session: Session,
    *,
    mode: str,
    deadline_seconds: float | None,
    reason: str,
    daemon: str | None,
    exit_: bool,
    created_by: str,
) -> Drain:
    """Begin a drain, in place of the one in force for the same. `daemon`: the name of those; None: all."""
    end_drains(session, daemon)
    now = read_clock(session)
    drain = Drain(
        id=new_id("drain"),
        mode=mode,
        deadline_at=None if deadline_seconds is None else now + deadline_seconds,
        reason=reason,
        daemon=daemon,
        exit=exit_,
        created_by=created_by,
        created_at=now,
        ended_at=None,
    )
    session.add(drain)
    session.flush()
    return drain


def end_drains(session: Session, daemon: str | None = None) -> None:
    """End the drain of daemons of this name; None: the one of all. None in force is no error."""
    in_force = update(Drain).where(IS_IN_FORCE, Drain.daemon == daemon)
    session.execute(in_force.values(ended_at=read_clock(session)))
