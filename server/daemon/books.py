"""The daemon's pen: every write is one transaction that first checks the epoch (docs/design.md §2.6)."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.orm import Session

from server.db.daemons import check_epoch
from server.db.session import Database


class Books:
    """A database and the epoch of one life of the daemon."""

    def __init__(self, database: Database, epoch: int):
        self.database = database
        self.epoch = epoch

    @contextmanager
    def write(self) -> Iterator[Session]:
        """All or nothing. Raises `Fenced`, having written nothing, when a newer daemon has taken over."""
        with self.database.write() as session:
            check_epoch(session, self.epoch)
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        with self.database.read() as session:
            yield session
