"""What the microbatches of a unit came to, added up in their order. Knows no cursor."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from engine.run import Outcome


class LossesBySet:
    """The mean loss a supervised token of each data set of a mixture."""

    def __init__(self, num_rows: Sequence[int]):
        """`num_rows` of each set, which lie end to end."""
        self._ends = np.cumsum(num_rows)
        self._nll = np.zeros(len(num_rows))
        self._num_targets = np.zeros(len(num_rows), np.int64)

    def add(self, rows: Sequence[int], logprobs: Sequence[Tensor]) -> None:
        """More rows, with log p of each one's targets."""
        for row, of_targets in zip(rows, logprobs, strict=True):
            part = np.searchsorted(self._ends, row, side="right")
            self._nll[part] -= float(of_targets.double().sum())
            self._num_targets[part] += len(of_targets)

    def means(self) -> list[float | None]:
        """None for a set of which there was no row."""
        pairs = zip(self._nll.tolist(), self._num_targets.tolist(), strict=True)
        return [nll / count if count else None for nll, count in pairs]


@dataclass
class Tally:
    """Sums since the unit began."""

    loss: float = 0.0
    aux_loss: float | None = None  # None without a router
    expert_loads: Tensor | None = None  # int64 [layers, E]: slots of each expert; None without a router
    by_set: LossesBySet | None = None  # None for a single data set

    def add(self, rows: Sequence[int], outcome: Outcome, *, share: float) -> None:
        """One microbatch more, of these rows, which hold this share of the unit's tokens."""
        self.loss += outcome.loss
        if outcome.aux_loss is not None:
            self.aux_loss = (self.aux_loss or 0.0) + outcome.aux_loss * share
        if outcome.expert_loads is not None:
            so_far = 0 if self.expert_loads is None else self.expert_loads
            self.expert_loads = outcome.expert_loads + so_far
        if self.by_set is not None:
            self.by_set.add(rows, outcome.logprobs)

    @property
    def losses(self) -> list[float | None] | None:
        """Of each data set of a mixture."""
        return None if self.by_set is None else self.by_set.means()
