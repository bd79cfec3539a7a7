"""What the daemon clears away now and then: jobs past their time, answers that nobody fetched, what deleted
tenants had, files without a row."""

import logging
import time

from server.daemon.books import Books, boot_time
from server.daemon.writer import Writer
from server.db import retention
from server.orphans import SAFE_SECONDS, orphans, orphans_of_dead, what_may_hide_rows
from server.settings import Settings
from server.store import LocalStore

log = logging.getLogger("mixloom.daemon")
UPKEEP_SECONDS = 600.0
DAY_SECONDS = 86400.0
STEADY_SECONDS = SAFE_SECONDS
"""So long a clock has to go right before anything is erased by its word: time for a wrong one to be set."""
JUMP_SECONDS = 60.0


class Clock:
    """The machine's clock, watched by the one that nobody sets, for as long as the process lasts."""

    def __init__(self) -> None:
        self._since = boot_time()
        self._ahead = time.time() - self._since

    def look(self) -> None:
        """Often: what jumps, and jumps back before the next look, is not seen."""
        now = boot_time()
        ahead = time.time() - now
        if abs(ahead - self._ahead) > JUMP_SECONDS:
            log.warning("clock_jumped", extra={"fields": {"seconds": round(ahead - self._ahead)}})
            self._since, self._ahead = now, ahead

    def is_steady(self) -> bool:
        """Whether it has not jumped for so long, nor was begun to be watched since."""
        self.look()
        return boot_time() - self._since >= STEADY_SECONDS


class Upkeep:
    """Looks every ten minutes, and goes on turn by turn while there is more; the erasing is the writer's."""

    def __init__(self, books: Books, store: LocalStore, writer: Writer, settings: Settings, clock: Clock):
        self.books = books
        self.store = store
        self.writer = writer
        self.kept_seconds = settings.retention_days * DAY_SECONDS
        self._next = 0.0
        self._clock = clock

    def turn(self) -> None:
        """Nothing, until ten minutes have passed since there was nothing more to clear; but the clock is looked at."""
        self._clock.look()
        if time.monotonic() >= self._next and self.clear():
            self._next = time.monotonic() + UPKEEP_SECONDS

    def clear(self) -> bool:
        """Erase a batch of what is past its time, or, where there is none, what no row names: then all is done.

        By its age nothing is erased while the clock may be wrong.
        """
        is_steady = self._clock.is_steady()
        with self.books.write() as session:
            keys = retention.forget_deleted_tenants(session)
            if is_steady:
                keys += retention.forget_unread(session)
                if self.kept_seconds:
                    keys += retention.forget_old_jobs(session, time.time() - self.kept_seconds)
        is_last = not keys
        if is_last and is_steady:
            keys = _surely(self.books, orphans(self.books.read, self.store))
            if keys:
                log.warning("orphans_erased", extra={"fields": {"keys": keys}})
        for key in keys:
            self.writer.delete(key)
        return is_last


def clear_orphans(books: Books, store: LocalStore) -> None:
    """At a daemon's start: what the last one had not published goes at once, unless another daemon lives.

    No clock is asked: what goes by its age is left to `Upkeep`.
    """
    for key in _surely(books, orphans_of_dead(books.read, store)):
        store.delete(key)


def _surely(books: Books, keys: list[str]) -> list[str]:
    """Folders that no row names; none of them where the database is so damaged that it may have such a row."""
    if not keys:
        return []
    with books.read() as session:
        damage = what_may_hide_rows(session)
    if damage:
        log.error("orphans_not_known", extra={"fields": {"keys": keys, "damage": damage}})
    return [] if damage else keys
