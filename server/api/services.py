"""What a request handler works with: made once in `create_app`, the same for every request."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.orm import Session

from server.api.waiting import OperationWatch
from server.db.session import Database, is_in_doubt
from server.disk import Disk
from server.settings import Settings
from server.store import LocalStore


@dataclass(frozen=True)
class Services:
    """The truth (database and store) and the settings. Nothing else is shared between requests."""

    settings: Settings
    database: Database
    store: LocalStore
    disk: Disk
    operations: OperationWatch
    admin_key_sha256: str
    admin_key_written: Path | None
    """Where this start has put one that it made."""

    @contextmanager
    def naming(self, key: str) -> Iterator[Session]:
        """A write of the row that names what lies under `key`. If it fails that goes, unless the row may be there."""
        try:
            with self.database.write() as session:
                yield session
        except BaseException as error:
            if not is_in_doubt(error):
                self.store.delete(key)
            raise
