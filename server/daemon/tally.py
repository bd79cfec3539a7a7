"""What the microbatches of a unit came to, added up in their order. Knows no rows and no cursor."""

from dataclasses import dataclass

from torch import Tensor

from engine.run import Outcome


@dataclass
class Tally:
    """Sums since the unit began."""

    loss: float = 0.0
    aux_loss: float | None = None  # None without a router
    expert_loads: Tensor | None = None  # int64 [layers, E]: slots of each expert; None without a router

    def add(self, outcome: Outcome, *, share: float) -> None:
        """One microbatch more, which holds this share of the unit's tokens."""
        self.loss += outcome.loss
        if outcome.aux_loss is not None:
            self.aux_loss = (self.aux_loss or 0.0) + outcome.aux_loss * share
        if outcome.expert_loads is not None:
            so_far = 0 if self.expert_loads is None else self.expert_loads
            self.expert_loads = outcome.expert_loads + so_far
