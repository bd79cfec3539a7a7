"""Statements on daemons: each row is one life of one, its number the epoch that fences what it writes."""

import time

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from server.db.pages import Page, fetch_page
from server.db.tables import Daemon


class Fenced(Exception):
    """A newer daemon has taken over: whatever this one still wants to write changes nothing."""


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


def begin_epoch(session: Session, pid: int) -> int:
    """Open a new life of a daemon; its number fences every earlier one's writes."""
    now = time.time()
    before = newest_daemon(session)
    daemon = Daemon(
        pid=pid,
        base_hash=None,
        state="starting",
        detail={},
        floor=before.floor if before else 0.0,
        started_at=now,
        heartbeat_at=now,
        ended_at=None,
    )
    session.execute(update(Daemon).where(Daemon.ended_at.is_(None)).values(ended_at=now, state="stopped"))
    session.add(daemon)
    session.flush()
    return daemon.epoch


def check_epoch(session: Session, epoch: int) -> None:
    """Raises `Fenced` once another life has begun. It locks this life's row, so that it guards all of the write."""
    life = select(Daemon.ended_at).where(Daemon.epoch == epoch).with_for_update(key_share=True)
    if session.execute(life).scalar_one() is not None:
        raise Fenced(f"epoch {epoch} has been overtaken")


def update_daemon(session: Session, epoch: int, **values: object) -> None:
    """Change this life's row, which also says that it is alive."""
    life = update(Daemon).where(Daemon.epoch == epoch).execution_options(synchronize_session=False)
    session.execute(life.values(heartbeat_at=time.time(), **values))
