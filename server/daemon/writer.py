"""Files are written and erased by one thread, from copies in memory, while training goes on."""

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.store import LocalStore


@dataclass
class _Pending:
    future: "Future[Any]"
    then: Callable[[Any], None]


class Writer:
    """Changes the store one folder after another; what follows runs in the loop's own thread."""

    def __init__(self, store: LocalStore):
        self.store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._pending: list[_Pending] = []

    @property
    def is_idle(self) -> bool:
        return not self._pending

    def put(self, key: str, write: Callable[[Path], None], then: Callable[[dict[str, str]], None]) -> None:
        """Publish a folder, then call `then` with its manifest: file name -> sha256."""
        self._pending.append(_Pending(self._thread.submit(self._put, key, write), then))

    def delete(self, key: str) -> None:
        """Erase a folder, once the writes before are done: one of them may be into it."""
        self._pending.append(_Pending(self._thread.submit(self.store.delete, key), lambda _: None))

    def after(self, then: Callable[[], None]) -> None:
        """Call `then` when all that was put so far is published; now, if nothing is under way."""
        if self.is_idle:
            then()
        else:
            self._pending.append(_Pending(self._thread.submit(lambda: None), lambda _: then()))

    def settle(self) -> None:
        """Run what follows the writes that are done, in order. An error of a write is raised here."""
        while self._pending and self._pending[0].future.done():
            pending = self._pending.pop(0)
            pending.then(pending.future.result())

    def wait(self) -> None:
        """Wait for every write, and run what follows."""
        while self._pending:
            self._pending[0].future.result()
            self.settle()

    def _put(self, key: str, write: Callable[[Path], None]) -> dict[str, str]:
        return manifest(self.store.put(key, write))


def manifest(folder: Path) -> dict[str, str]:
    """sha256 of each file of a folder."""
    hashes = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
