"""Statements on base models, and on which of them is in force."""

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from server.db.daemons import IS_LIVE
from server.db.session import one_at_a_time, read_only
from server.db.tables import Base, Daemon
from server.errors import MixloomError

NEWEST = (
    select(Base)
    .join(Daemon, Daemon.base_hash == Base.hash)
    .order_by(func.coalesce(IS_LIVE, False).desc(), Daemon.epoch.desc())
    .limit(1)
)


def find_base(session: Session) -> Base | None:
    """The base of the newest live daemon that has one, else of the last that had; None before the first."""
    return next(iter(read_only(session, NEWEST)), None)


def publish(session: Session, base: Base) -> None:
    """Add a base, or bring its row up to date."""
    one_at_a_time(session, "bases")
    session.merge(base)


def current_base(session: Session) -> Base:
    """The base that new jobs train on. Raises 503 `base_not_ready` while there is none."""
    base = find_base(session)
    if base is None:
        raise MixloomError(
            "base_not_ready",
            "The engine daemon is still loading the base model. Try again when GET /readyz says ready.",
            503,
            headers={"Retry-After": "5"},
        )
    return base


def all_keys(session: Session) -> set[str]:
    """The store's keys of every base's tokenizer."""
    return set(session.scalars(select(Base.folder_key)))
