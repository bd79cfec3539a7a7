"""Statements on base models, and on which of them is in force."""

import time

from sqlalchemy import select
from sqlalchemy.orm import Session

from server.db.tables import Base, Daemon
from server.errors import MixloomError

LIVE_SECONDS = 15.0
"""A daemon whose last heartbeat is older counts as gone."""


def current_base(session: Session) -> Base:
    """The base that new jobs train on: the newest one that a daemon published, even if that daemon is gone.

    Raises 503 `base_not_ready` while there is none.
    """
    base = session.scalar(
        select(Base).join(Daemon, Daemon.base_hash == Base.hash).order_by(Daemon.epoch.desc()).limit(1)
    )
    if base is None:
        raise MixloomError(
            "base_not_ready",
            "The engine daemon is still loading the base model. Ask GET /readyz until it says so, then try again.",
            503,
            headers={"Retry-After": "5"},
        )
    return base


def newest_daemon(session: Session) -> Daemon | None:
    """The last daemon that started, alive or not."""
    return session.scalar(select(Daemon).order_by(Daemon.epoch.desc()).limit(1))


def is_live(daemon: Daemon | None) -> bool:
    """Whether a daemon is there and has been heard lately."""
    return daemon is not None and daemon.ended_at is None and time.time() - daemon.heartbeat_at < LIVE_SECONDS
