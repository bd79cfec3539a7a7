"""A run: one adapter in training with its optimizer and its place in the random sequence. It knows no dataset."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.adapter import Adapter
from engine.optimizer import AdamW
from engine.random import DropoutKey


@dataclass
class Run:
    """What `Engine.create_run` gives and `Engine.load` brings back.

    `step` counts optimizer steps, `microbatch` the microbatches since the last one: with the seed they are the
    whole random state.
    """

    adapter: Adapter
    seed: int
    gradient: Tensor  # float32 [size]
    optimizer: AdamW
    microbatch: int = 0

    @classmethod
    def fresh(cls, adapter: Adapter, seed: int) -> "Run":
        return cls(adapter, seed, torch.zeros_like(adapter.flat), AdamW.zeros_like(adapter.flat))

    @property
    def step(self) -> int:
        return self.optimizer.step

    @property
    def bytes(self) -> int:
        """Parameters, gradient and both moments."""
        return 4 * self.adapter.flat.nbytes

    def discard_gradient(self) -> None:
        """Back to just after the last optimizer step."""
        self.gradient.zero_()
        self.microbatch = 0

    def dropout_key(self, microbatch: int) -> DropoutKey | None:
        """None for an adapter without dropout."""
        probability = self.adapter.config.dropout
        return DropoutKey(self.seed, self.step, microbatch, probability) if probability else None


@dataclass(frozen=True)
class Row:
    """One sequence: the loss asks for the tokens at `targets` (positions from 1), each with its weight."""

    tokens: np.ndarray  # int [L]
    targets: np.ndarray  # int [N]
    weights: np.ndarray  # float [N]


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """Rows that ride as one segment: of a run in training (`forward_backward`) or of any adapter (`forward`)."""

    rows: list[Row]
    run: Run | None = None
    adapter: Adapter | None = None
    loss: str = "cross_entropy"
    auxiliary_weight: float = 1.0
    """The segment's share of its optimizer step's tokens: weighs the routers' auxiliary loss."""

    @property
    def num_tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)


@dataclass(frozen=True)
class Outcome:
    """What a pass says of one microbatch."""

    logprobs: list[Tensor]  # one a row: log p(target) [N]
    loss: float  # Σ w·nll
    aux_loss: float | None  # averaged over layers, before `auxiliary_weight`; None without a router
    expert_loads: Tensor | None  # int64 [layers, E]
