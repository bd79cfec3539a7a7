"""What a request handler works with: made once in `create_app`, the same for every request."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.orm import Session

from server.api.waiting import OperationWatch
from server.db import tenants
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
    def naming(self, key: str, tenant_id: str) -> Iterator[Session]:
        """Add a tenant's row, which names the files at `key`. If that fails those go, unless the row may be there.

        Raises 401 for a tenant that was deleted since its key was looked up.
        """
        try:
            with self.database.write() as session:
                tenants.hold_tenant(session, tenant_id)
                yield session
        except BaseException as error:
            if not is_in_doubt(error):
                self.store.delete(key)
            raise
