"""Whether the loop still moves. Knows no process and no database."""

MULTIPLE = 20


class Pulse:
    """The loop beats at every turn and every pass; another thread watches.

    Hung is who was silent for `hang_seconds`, and for `MULTIPLE` times the longest silence so far that ended well: a
    slow machine is not hung. The first one is an estimate. Time is counted in the watcher's own looks, so that a
    machine that slept has lost none of it.
    """

    def __init__(self, hang_seconds: float):
        self.hang_seconds = hang_seconds
        self.longest_seconds = 0.0
        self._beats = 0
        self._seen = 0
        self._silent_seconds = 0.0

    def beat(self) -> None:
        """The loop has moved."""
        self._beats += 1

    def expect(self, seconds: float) -> None:
        """A silence so long would be nothing unusual."""
        self.longest_seconds = max(self.longest_seconds, seconds)

    def is_hung(self, seconds: float) -> bool:
        """`seconds` since this was last asked. Nothing is hung before the first beat."""
        self._silent_seconds += seconds if self._beats else 0.0
        if self._beats != self._seen:
            self.expect(self._silent_seconds)
            self._seen, self._silent_seconds = self._beats, 0.0
        return self._silent_seconds > max(self.hang_seconds, MULTIPLE * self.longest_seconds)
