"""How lives of daemons end: by their own hand, or because nobody lives them any more. What they held waits again."""

import time
from collections.abc import Sequence

from sqlalchemy import ColumnElement, or_, select, true, update
from sqlalchemy.orm import Session

from server.db import operations, runs
from server.db.clock import now
from server.db.daemons import IS_OPEN
from server.db.tables import Daemon


def end_life(session: Session, epoch: int) -> None:
    """By its own hand: nothing that it held is to blame."""
    _end(session, [epoch], crashed=False)


def end_children(session: Session, supervisor: str) -> None:
    """Of a supervisor that has ended its child itself: nothing that it held is to blame either."""
    of_supervisor = select(Daemon.epoch).where(IS_OPEN, Daemon.supervisor == supervisor).with_for_update()
    if epochs := session.scalars(of_supervisor).all():
        _end(session, epochs, crashed=False)


def end_dead(session: Session, *, supervisor: str | None, crashed: bool = True, but: int | None = None) -> None:
    """End the lives that have expired, and those of our supervisor's earlier children, `but` our own.

    Not as `crashed` where we were out of touch ourselves: so may have been the others. It runs at each beginning of a
    life and at each heartbeat. A row that somebody holds is left for the next time: a second reaper, or the dead one's
    own connection, of which the database has not heard yet.
    """
    is_dead: list[ColumnElement[bool]] = [Daemon.expires_at.is_(None), Daemon.expires_at <= now()]
    if supervisor is not None:
        is_dead.append(Daemon.supervisor == supervisor)
    if session.get_bind().dialect.name == "sqlite":
        is_dead.append(true())  # who holds the flock of the data directory is alone
    dead = select(Daemon.epoch).where(IS_OPEN, or_(*is_dead)).with_for_update(skip_locked=True)
    if but is not None:
        dead = dead.where(Daemon.epoch != but)
    if epochs := session.scalars(dead).all():
        _end(session, epochs, crashed=crashed)


def end_all(session: Session) -> None:
    """Of a copy of the tables, where nobody lives: nothing is to blame there either."""
    _end(session, session.scalars(select(Daemon.epoch).where(IS_OPEN)).all(), crashed=False)


def _end(session: Session, epochs: Sequence[int], *, crashed: bool) -> None:
    lives = update(Daemon).where(Daemon.epoch.in_(epochs), IS_OPEN).execution_options(synchronize_session=False)
    session.execute(lives.values(ended_at=time.time(), state="stopped"))
    runs.release(session, epochs, crashed=crashed)
    operations.release(session, epochs, crashed=crashed)
