"""Files that must survive, under keys relative to one root. Rename and fsync live here alone."""

import errno
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from server.faults import fault

Manifest = dict[str, dict[str, Any]]
"""File name -> {"sha256", "bytes"}."""


class LocalStore:
    """A directory. A folder appears under its key whole and durable, or not at all."""

    def __init__(self, root: Path):
        self.root = root

    def path(self, key: str) -> Path:
        """The local path of a key. Keys are made by the server from its own ids, never by a client."""
        return self.root / key

    def put(self, key: str, write: Callable[[Path], None]) -> Path:
        """Let `write` fill a new folder with files, then publish it at `key`: fsync them and it, rename, fsync again.

        A folder already at `key` is replaced. What an fsync failed for is lost, whatever a second one would say: all
        of it is removed, and another `put` begins with new files.

        Raises:
            OSError: the disk did not take it.
        """
        final, prefix = self.path(key), key.partition("/")[0]
        _make_durable(final.parent)
        written = final.with_name(f"{final.name}.{secrets.token_hex(4)}.tmp")
        written.mkdir()
        try:
            write(written)
            fault("put.written", [prefix])
            for file in written.iterdir():
                _fsync(file)
            _fsync(written)
            fault("put.synced", [prefix])
            if final.exists():
                shutil.rmtree(final)
            written = written.rename(final)
            fault("put.renamed", [prefix])
            _fsync(final.parent)
            fault("put.published", [prefix])
        except BaseException as error:
            shutil.rmtree(written, ignore_errors=True)
            if isinstance(error, SafetensorError) and (number := re.search(r"os error (\d+)", str(error))):
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
            raise
        return final

    def publish_file(self, file: Path, name: str) -> None:
        """Put a written file at a name in the root, in place of the one that is there."""
        _fsync(file)
        file.replace(self.root / name)
        _fsync(self.root)

    def publish_new_file(self, file: Path, name: str) -> None:
        """The same where there is none. Raises FileExistsError."""
        _fsync(file)
        os.link(file, self.root / name)
        _fsync(self.root)

    def children(self, prefix: str) -> list[str]:
        """Keys one level under `prefix`, those of unfinished folders among them."""
        try:
            return sorted(f"{prefix}/{name}" for name in os.listdir(self.path(prefix)))
        except (FileNotFoundError, NotADirectoryError):  # there is none, or somebody else was faster
            return []

    def list(self, prefix: str) -> list[str]:
        """The same without the unfinished ones."""
        return [key for key in self.children(prefix) if not key.endswith(".tmp")]

    def is_older(self, key: str, seconds: float) -> bool:
        """Whether a folder has not changed for so long; one that is gone by now is not."""
        try:
            return time.time() - self.path(key).stat().st_mtime >= seconds
        except FileNotFoundError:
            return False

    def delete(self, key: str) -> None:
        """Remove a key; a missing one is no error."""
        shutil.rmtree(self.path(key), ignore_errors=True)


def sha256_of(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest(folder: Path) -> Manifest:
    """What each file of a folder is: to be kept in a row, and compared before the files are trusted."""
    return {path.name: {"sha256": sha256_of(path), "bytes": path.stat().st_size} for path in sorted(folder.iterdir())}


def manifest_of(contents: Mapping[str, bytes]) -> Manifest:
    """The same of files that are yet to be written."""
    return {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        for name, content in contents.items()
    }


def is_whole(folder: Path, expected: Manifest) -> bool:
    """Whether a folder holds the files of a manifest and no others; what cannot be read is not whole."""
    try:
        found = manifest(folder)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EIO):
            raise
        return False
    return _hashes(found) == _hashes(expected)


def _hashes(of: Manifest) -> dict[str, str]:
    return {name: file["sha256"] for name, file in of.items()}


def _make_durable(folder: Path) -> None:
    """Make a folder and those above it, so that it is still there after the power has failed."""
    if not folder.is_dir():
        _make_durable(folder.parent)
        folder.mkdir(exist_ok=True)
        _fsync(folder.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
