"""The daemon's pen and its lease: every write is one transaction that first checks the epoch (docs/design.md §2.6)."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from sqlalchemy import Connection
from sqlalchemy.orm import Session

from server.db import daemons, leases
from server.db.daemons import Fenced
from server.db.session import Database


def boot_time() -> float:
    """Seconds of this machine's own clock, which nobody sets and which goes on while a process is stopped."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Books:
    """A database and one life of the daemon.

    The life is a lease: others may end it when it was not renewed for `lease_seconds` of the database's clock, and it
    gives itself up after half of that by its own. What it holds ends with it, so who has checked the life has checked
    the lease of every run.
    """

    def __init__(
        self,
        database: Database,
        epoch: int,
        seat: int,
        *,
        lease_seconds: float,
        supervisor: str | None,
        name: str | None,
        begun: float,
        ahead: float,
    ):
        self.database = database
        self.epoch = epoch
        self.seat = seat
        self.lease_seconds = lease_seconds
        self.name = name
        self._supervisor = supervisor
        self.writes = 0  # that the database has answered for, at least
        self._renewed = begun
        self._ahead = ahead  # the database's clock, of ours, at the last heartbeat
        self._pardons_until = begun

    @classmethod
    def begin(
        cls,
        database: Database,
        *,
        lease_seconds: float,
        supervisor: str | None = None,
        name: str | None = None,
        before: int | None = None,
    ) -> "Books":
        """Begin a life. `before` was this process's last one: it ends without blame.

        Lives that are over end here too, and what they held waits again.
        """
        begun = boot_time()
        with database.write() as session:
            if before is not None:
                leases.end_life(session, before)
            leases.end_dead(session, supervisor=supervisor, crashed=before is None)
            life = daemons.begin_life(
                session,
                pid=os.getpid(),
                supervisor=supervisor,
                name=name,
                lease_seconds=lease_seconds,
                before=before,
            )
            ahead = daemons.read_clock(session) - boot_time()
        return cls(
            database,
            life.epoch,
            life.seat,
            lease_seconds=lease_seconds,
            supervisor=supervisor,
            name=name,
            begun=begun,
            ahead=ahead,
        )

    @contextmanager
    def write(self, **values: object) -> Iterator[Session]:
        """All or nothing, with new values in this life's own row.

        Raises `Fenced`, having written nothing, when this life is over.
        """
        self.check()
        with self._write(values) as session:
            yield session

    @contextmanager
    def _write(self, values: Mapping[str, object]) -> Iterator[Session]:
        with self.database.write() as session:
            count = daemons.count_write(session, self.epoch, self.writes, values)
            yield session
        self.writes = max(self.writes, count)  # other threads write as well

    @contextmanager
    def read(self) -> Iterator[Session]:
        with self.database.read() as session:
            yield session

    @contextmanager
    def glance(self) -> Iterator[Connection]:
        """For a single statement on columns."""
        with self.database.glance() as connection:
            yield connection

    def check(self) -> None:
        """Raises `Fenced` when the lease was not renewed for half of its time."""
        silent = boot_time() - self._renewed
        if silent > self.lease_seconds / 2:
            raise Fenced(f"the lease of epoch {self.epoch} was last renewed {silent:.1f} seconds ago")

    def renew(self) -> None:
        """A heartbeat: this life goes on, and those that nobody lives any more end. Raises `Fenced`.

        Where the database's clock has jumped ahead they may well live, so nothing that they hold is to blame: until,
        a lease later, each of them would have been heard again.
        """
        sent = boot_time()
        with self._write({}) as session:
            theirs, ours = daemons.renew(session, self.epoch, self.lease_seconds), boot_time()
            if theirs - ours - self._ahead > self.lease_seconds / 2:
                self._pardons_until = ours + self.lease_seconds
            crashed = ours >= self._pardons_until
            leases.end_dead(session, supervisor=self._supervisor, crashed=crashed, but=self.epoch)
        self._renewed, self._ahead = sent, theirs - ours

    def end(self) -> None:
        """End this life in order: nothing is held any more."""
        with self.write() as session:
            leases.end_life(session, self.epoch)
