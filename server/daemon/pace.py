"""How fast gangs go. Knows no clock."""

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
