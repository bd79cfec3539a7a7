"""Room on the disk that holds the data directory: how much is left, and what its lack looks like. Knows no SQL."""

import errno
import os

from server.errors import MixloomError
from server.settings import MIB, Settings

BALLAST_BYTES = 16 * MIB
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FAILING = frozenset({errno.EIO, errno.EROFS})
_SQLITE_FULL = frozenset({13, 778, 4874})
"""SQLITE_FULL; SQLITE_IOERR_WRITE, which a limit on the size of a file gives; SQLITE_IOERR_SHMSIZE."""
_POSTGRESQL_FULL = "53100"


class Disk:
    """What a data directory may still take.

    Below `min_free_bytes` nothing new is begun, so that what is under way can be written. Others may fill the disk
    all the same: then a file that is there for this alone, the ballast, is given up, so that rows still fit.
    """

    def __init__(self, settings: Settings):
        self.min_free_bytes = settings.min_free_disk_mib * MIB
        self._folder = settings.data_dir
        self._ballast = settings.data_dir / "ballast"

    @property
    def free_bytes(self) -> int:
        """What this user may still write."""
        status = os.statvfs(self._folder)
        return status.f_bavail * status.f_frsize

    @property
    def is_low(self) -> bool:
        return self.free_bytes < self.min_free_bytes

    def tend_ballast(self) -> None:
        """Give the ballast up while there is less room than it takes, and restore it when there is plenty."""
        free, exists = self.free_bytes, self._ballast.exists()
        if exists and free < BALLAST_BYTES:
            self.give_up_ballast()
        elif not exists and free >= self.min_free_bytes + 2 * BALLAST_BYTES:
            self._restore_ballast()

    def give_up_ballast(self) -> None:
        try:
            self._ballast.unlink(missing_ok=True)
        except OSError as error:
            if error.errno != errno.EROFS:  # there it gives nobody room
                raise

    def _restore_ballast(self) -> None:
        try:
            with self._ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, BALLAST_BYTES)
        except OSError:  # somebody else was faster, there is a limit that is not the disk's, or it may not be written
            self.give_up_ballast()

    def refuse_if_low(self) -> None:
        """Raises 507 `disk_full`."""
        if self.is_low:
            raise self.full_error()

    def full_error(self) -> MixloomError:
        """For whoever asked for something that takes room."""
        return MixloomError(
            "disk_full",
            f"The server's disk is full: {self.free_bytes // MIB} MiB are free, and it keeps "
            f"{self.min_free_bytes // MIB}. Nothing of this was kept. Delete data sets, adapters or jobs that you do "
            "not need, or tell the operator; then send it again.",
            507,
            headers={"Retry-After": "60"},
        )


def is_full(error: BaseException) -> bool:
    """Whether a file system, SQLite or PostgreSQL says that there is no room."""
    said = getattr(error, "orig", None) or error  # SQLAlchemy wraps what the driver raised
    return (
        getattr(said, "errno", None) in _FULL
        or getattr(said, "sqlite_errorcode", None) in _SQLITE_FULL
        or getattr(said, "sqlstate", None) == _POSTGRESQL_FULL
    )


def may_pass(error: OSError) -> bool:
    """Whether a write that failed so is worth another try: the disk is full, or says that it is broken."""
    return error.errno in _FULL | _FAILING
