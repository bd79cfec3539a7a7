"""Files that must survive, under keys relative to one root. Rename and fsync live here alone."""

import os
import shutil
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LocalStore:
    """A directory. A folder appears under its key whole and durable, or not at all."""

    def __init__(self, root: Path):
        self.root = root

    def path(self, key: str) -> Path:
        """The local path of a key. Keys are made by the server from its own ids, never by a client."""
        return self.root / key

    def put(self, key: str, write: Callable[[Path], None]) -> Path:
        """Let `write` fill a new folder, then publish it at `key`: write, fsync, rename, fsync the parent.

        A folder already at `key` is replaced (a retry after a crash writes the same bytes again).
        """
        final = self.path(key)
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(final.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            write(temporary)
            for file in temporary.rglob("*"):
                if file.is_file():
                    _fsync(file)
            _fsync(temporary)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _fsync(final.parent)
        return final

    def list(self, prefix: str) -> list[str]:
        """Keys one level under `prefix`, unfinished ones excluded."""
        folder = self.path(prefix)
        if not folder.is_dir():
            return []
        return sorted(f"{prefix}/{child.name}" for child in folder.iterdir() if not child.name.endswith(".tmp"))

    def remove_orphans(self, prefix: str, named: Collection[str], *, seconds: float = 0.0) -> None:
        """Delete what lies one level under `prefix`, unfinished or not in `named`, and is at least so old."""
        folder = self.path(prefix)
        for child in folder.iterdir() if folder.is_dir() else ():
            with suppress(FileNotFoundError):  # somebody else was faster
                if f"{prefix}/{child.name}" not in named and time.time() - child.stat().st_mtime >= seconds:
                    shutil.rmtree(child)

    def delete(self, key: str) -> None:
        """Remove a key; a missing one is no error."""
        shutil.rmtree(self.path(key), ignore_errors=True)
