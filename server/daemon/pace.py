"""How fast gangs go, and how long the engine works."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

MEMORY_SECONDS = 60.0
"""What was so long ago counts 1/e: estimates stay calm where gangs are short."""


@dataclass
class Pace:
    """Sums over the last gangs, in which older ones count less."""

    _gangs: float = 0.0
    _tokens: float = 0.0
    _seconds: float = 0.0
    _ended: float | None = None  # the last gang, unless the daemon has rested since

    @property
    def tokens_per_second(self) -> float:
        return self._tokens / self._seconds if self._seconds else 0.0

    @property
    def gang_seconds(self) -> float:
        return self._seconds / self._gangs if self._gangs else 0.0

    def add(self, tokens: int, *, began: float, ended: float) -> None:
        """A gang. What lies between it and the one before, such as decisions and books, is in its time."""
        seconds = ended - (began if self._ended is None else self._ended)
        kept = math.exp(-seconds / MEMORY_SECONDS)
        self._gangs = kept * self._gangs + 1
        self._tokens = kept * self._tokens + tokens
        self._seconds = kept * self._seconds + seconds
        self._ended = ended

    def rest(self) -> None:
        """Nothing trains: the time until the next gang is not its own."""
        self._ended = None


class Watch:
    """Adds up the time that goes by in its blocks."""

    seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - began
