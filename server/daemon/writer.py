"""Files are written and erased by one thread, from copies in memory, while training goes on."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from server.disk import may_pass
from server.store import LocalStore, Manifest, manifest

log = logging.getLogger("mixloom.daemon")
RETRY_SECONDS = 1.0
MOMENT_SECONDS = 0.05


@dataclass
class _Pending:
    future: "Future[Any]"
    then: Callable[[Any], None]


class Writer:
    """Changes the store one folder after another; what follows runs in the loop's own thread.

    What the disk does not take is written again, each time into new files, until it does. Erasing does not wait
    behind that: it may be what makes room.
    """

    def __init__(self, store: LocalStore, beat: Callable[[], None] = lambda: None):
        """`beat` is called at each write that fails: who waits for it does not hang."""
        self.store = store
        self._beat = beat
        self.trouble: OSError | None = None
        """Why the last try at the write under way failed."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._pending: list[_Pending] = []
        self._unwanted: SimpleQueue[str] = SimpleQueue()
        self._failures: SimpleQueue[tuple[Callable[[OSError], None], OSError]] = SimpleQueue()
        self._gives_up = threading.Event()

    @property
    def is_idle(self) -> bool:
        return not self._pending

    def put(
        self,
        key: str,
        write: Callable[[Path], None],
        then: Callable[[Manifest], None],
        failed: Callable[[OSError], None] = lambda error: None,
    ) -> None:
        """Publish a folder, then call `then` with its manifest; before that `failed`, once, if the first try did."""
        self._pending.append(_Pending(self._thread.submit(self._put, key, write, failed), then))

    def delete(self, key: str) -> None:
        """Erase a folder, once the writes before are done: one of them may be into it."""
        self._unwanted.put(key)
        self._pending.append(_Pending(self._thread.submit(self._erase), lambda _: None))

    def after(self, then: Callable[[], None]) -> None:
        """Call `then` when all that was put so far is published; now, if nothing is under way."""
        if self.is_idle:
            then()
        else:
            self._pending.append(_Pending(self._thread.submit(lambda: None), lambda _: then()))

    def settle(self) -> None:
        """Run what follows the writes that are done, in order. An error that another try cannot cure is raised."""
        while True:
            try:
                failed, error = self._failures.get_nowait()
            except Empty:
                break
            failed(error)
        while self._pending and self._pending[0].future.done():
            pending = self._pending.pop(0)
            pending.then(pending.future.result())

    def wait(self) -> None:
        """Wait for every write, and run what follows."""
        while self._pending:
            self._pending[0].future.result()
            self.settle()

    def wait_a_moment(self) -> None:
        """For the next write that is under way, and no longer."""
        if self._pending:
            wait([self._pending[0].future], timeout=MOMENT_SECONDS)
            self.settle()

    def give_up(self) -> None:
        """Drop what the disk does not take, all that waits behind it, and what would follow; erasing goes on."""
        self._gives_up.set()
        dropped, self._pending = self._pending, []
        wait([pending.future for pending in dropped if not pending.future.cancel()])
        self.trouble = None
        self._gives_up.clear()
        self._pending.append(_Pending(self._thread.submit(self._erase), lambda _: None))

    def close(self) -> None:
        """Give up what the disk has not taken: this life of the daemon is over."""
        self._gives_up.set()
        self._thread.shutdown(cancel_futures=True)

    def _put(self, key: str, write: Callable[[Path], None], failed: Callable[[OSError], None]) -> Manifest:
        pause = 0.0
        while True:
            try:
                written = manifest(self.store.put(key, write))
            except OSError as error:
                if not may_pass(error):
                    raise
                log.error("write_failed", extra={"fields": {"key": key, "reason": str(error)}})
                if not pause:
                    self._failures.put((failed, error))
                self.trouble = error
                self._beat()
                self._erase()
                if self._gives_up.wait(pause):
                    raise
                pause = RETRY_SECONDS
            else:
                self.trouble = None
                return written

    def _erase(self) -> None:
        while not self._unwanted.empty():
            self.store.delete(self._unwanted.get())
