"""How many tokens one pass may have, learned from those that did not fit into memory. Arithmetic only."""

import math

FIRST_PATIENCE = 64


class PassLimit:
    """Half of what did not fit. Doubled after some passes that did: what was in the way may be gone.

    Each failure makes the next trial wait twice as long, so that trials cost next to nothing in the long run.
    """

    def __init__(self) -> None:
        self.tokens = math.inf
        self._patience = FIRST_PATIENCE
        self._fitting = 0

    def failed(self, tokens: int) -> None:
        """A pass of so many tokens did not fit."""
        self.tokens = max(1, tokens // 2)
        self._patience *= 2
        self._fitting = 0

    def fitted(self) -> None:
        """A pass within the limit did."""
        self._fitting += 1
        if self._fitting >= self._patience:
            self.tokens *= 2
            self._fitting = 0
