"""The weights that a job starts from: a copy beside its rows, so that the adapter may be deleted.

Knows no SQL and no tensors.
"""

import shutil
from pathlib import Path

from server.adapter_files import WEIGHTS
from server.store import sha256_of


class Damaged(OSError):
    """The file is not the one whose hash was kept."""


def copy_start(source: Path, folder: Path, sha256: str) -> None:
    """Put an adapter's weights into a job's folder. Raises FileNotFoundError, `Damaged`."""
    shutil.copyfile(source / WEIGHTS, folder / WEIGHTS)
    check_start(folder, sha256)


def check_start(folder: Path, sha256: str) -> None:
    """Raises FileNotFoundError or `Damaged` when the weights in a job's folder are not those that were copied."""
    if sha256_of(folder / WEIGHTS) != sha256:
        raise Damaged(f"{WEIGHTS} has another hash than the adapter had")
