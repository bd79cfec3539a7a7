"""Statements on daemons: each row is one life of one, its number the epoch that fences what it writes.

A life is a lease on the database's clock. What it holds, runs and operations, it holds as long as it is not ended; who
ends it lets all of that go in the same transaction (`server.db.leases`).
"""

import time
from collections.abc import Mapping, Sequence

from sqlalchemy import ColumnElement, bindparam, select, update
from sqlalchemy.orm import Session

from server.db import seats
from server.db.clock import now
from server.db.pages import Listing, Page
from server.db.session import Reader, read_only
from server.db.tables import Daemon


class Fenced(Exception):
    """This life of a daemon is over: whatever it still wants to write changes nothing."""


LATELY_SECONDS = 3600.0
"""A daemon that was there within so long may come back."""
IS_OPEN: ColumnElement[bool] = Daemon.ended_at.is_(None)
IS_LIVE: ColumnElement[bool] = IS_OPEN & (Daemon.expires_at > now())
_LIVE = select(Daemon).where(IS_LIVE).order_by(Daemon.epoch.desc())
_LIVES = Listing(select(Daemon), identity=Daemon.epoch, order=(Daemon.epoch,))
_DAEMONS = Daemon.metadata.tables["daemons"]
_UPDATE = update(_DAEMONS).where(_DAEMONS.c.epoch == bindparam("life"))
_COUNT = _UPDATE.values(writes=_DAEMONS.c.writes + 1).returning(_DAEMONS.c.ended_at, _DAEMONS.c.writes)


def live_daemons(reader: Reader) -> Sequence[Daemon]:
    """Those that have been heard lately, the newest first."""
    return read_only(reader, _LIVE)


def others_of_base(session: Session, base_hash: str, *, epoch: int, name: str | None) -> bool:
    """Whether another daemon serves this base, loads one that may be this, or did so within the last hour."""
    others = select(Daemon.epoch).where(Daemon.epoch != epoch)
    lives = IS_LIVE & (Daemon.base_hash.is_(None) | (Daemon.base_hash == base_hash))
    lived = (
        Daemon.name.is_distinct_from(name)
        & (Daemon.base_hash == base_hash)
        & (Daemon.expires_at > now() - LATELY_SECONDS)
    )
    return session.scalar(others.where(lives | lived).limit(1)) is not None


def is_any_live(session: Session) -> bool:
    """Whether a daemon has been heard lately."""
    return session.scalar(select(Daemon.epoch).where(IS_LIVE).limit(1)) is not None


def list_daemons(session: Session, page: Page) -> tuple[list[Daemon], bool]:
    """A page of all lives of daemons, and whether more follow."""
    return _LIVES.page(session, page)


def exists_named(session: Session, name: str) -> bool:
    """Whether there is, or was, a daemon of this name."""
    return session.scalar(select(Daemon.epoch).where(Daemon.name == name).limit(1)) is not None


def read_clock(session: Session) -> float:
    """The database's time."""
    return session.execute(select(now())).scalar_one()


def is_live(daemon: Daemon, at: float) -> bool:
    """Whether it was there and its lease held at a time of the database."""
    return daemon.ended_at is None and daemon.expires_at is not None and daemon.expires_at > at


def begin_life(
    session: Session,
    *,
    pid: int,
    supervisor: str | None,
    name: str | None,
    lease_seconds: float,
    before: int | None = None,
) -> Daemon:
    """Open a new life of a daemon, on a seat of its own: that of its life `before`, if nobody has taken it."""
    seat, at = seats.take(session, before), read_clock(session)
    daemon = Daemon(
        pid=pid,
        base_hash=None,
        state="starting",
        detail={},
        floor=seats.floor(session, seat),
        started_at=time.time(),
        heartbeat_at=at,
        ended_at=None,
        expires_at=at + lease_seconds,
        supervisor=supervisor,
        name=name,
        rests_under=None,
        seat=seat,
    )
    session.add(daemon)
    session.flush()
    return daemon


def count_write(session: Session, epoch: int, known: int, values: Mapping[str, object]) -> int:
    """The number of this write among those of a life, which knows of so many. It locks the life's row until the end.

    With it come new values of that row.

    Raises `Fenced` once the life is over, or where the database has lost what it had answered for: a standby that
    lagged behind took its place, and nobody has to have seen a connection break.
    """
    row = session.connection().execute(_COUNT, {"life": epoch, **values}).one_or_none()
    if row is None:
        raise Fenced(f"the database has lost epoch {epoch}")
    if row.ended_at is not None:
        raise Fenced(f"epoch {epoch} is over")
    check_written(epoch, row.writes - 1, known)
    return int(row.writes)


def check_written(epoch: int, found: int, known: int) -> None:
    """Raises `Fenced` where fewer writes of a life are found than it knows of."""
    if found < known:
        raise Fenced(f"the database has {found} of {known} writes of epoch {epoch}: it has lost what came later")


def renew(session: Session, epoch: int, lease_seconds: float) -> float:
    """Say that this life goes on; the database's time."""
    values = _UPDATE.values(heartbeat_at=now(), expires_at=now() + lease_seconds)
    return session.execute(values.returning(_DAEMONS.c.heartbeat_at), {"life": epoch}).scalar_one()


def update_daemon(session: Session, epoch: int, **values: object) -> None:
    """Change this life's row."""
    session.execute(_UPDATE, {"life": epoch, **values})
