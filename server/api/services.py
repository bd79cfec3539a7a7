"""What a request handler works with: made once in `create_app`, the same for every request."""

from dataclasses import dataclass

from server.api.waiting import OperationWatch
from server.db.session import Database
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
