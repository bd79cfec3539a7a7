"""How fast gangs go, and how long the engine works."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Pace:
    """Means in which the last gang counts a fifth."""

    tokens_per_second: float = 0.0
    gang_seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        weight = 0.2 if self.gang_seconds else 1.0
        rate = tokens / max(seconds, 1e-6)
        self.tokens_per_second += weight * (rate - self.tokens_per_second)
        self.gang_seconds += weight * (seconds - self.gang_seconds)


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
