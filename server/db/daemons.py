"""Statements on daemons: each row is one life of one, its number the epoch that fences what it writes."""

import time

from sqlalchemy import select
from sqlalchemy.orm import Session

from server.db.pages import Page, fetch_page
from server.db.tables import Daemon

LIVE_SECONDS = 15.0
"""A daemon whose last heartbeat is older counts as gone."""


def newest_daemon(session: Session) -> Daemon | None:
    """The last daemon that started, alive or not."""
    return session.scalar(select(Daemon).order_by(Daemon.epoch.desc()).limit(1))


def is_live(daemon: Daemon | None) -> bool:
    """Whether a daemon is there and has been heard lately."""
    return daemon is not None and daemon.ended_at is None and time.time() - daemon.heartbeat_at < LIVE_SECONDS


def list_daemons(session: Session, page: Page) -> tuple[list[Daemon], bool]:
    """A page of all lives of daemons, and whether more follow."""
    return fetch_page(session, select(Daemon), page, identity=Daemon.epoch, order=(Daemon.epoch,))
