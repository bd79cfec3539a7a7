"""Microbatches laid end to end in one pass, without padding between them.

Legend: T packed tokens, S segments.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from engine.adapter import Parameter, Weights
from engine.cache import KeyValueCache
from engine.device import to_device
from engine.dropout import Dropout, Dropped
from engine.grouped import Groups, Slices
from engine.rows import Rows

ROW_MULTIPLE = 16
"""A matmul's rows do not depend on the other rows when their number is a multiple of this (docs/design.md §3)."""
FEWEST_ROWS = 32
"""Of a segment whose bits do not depend on the number of threads; of fewer (6, say) they may."""
PAIRS = 8
"""So many pairs of low-rank matrices take as long as a token of the base, however few rows they are for: as
`scheduler.cost.MODULES`, which is what they are charged."""
MAX_PACKED_TOKENS = 8192
"""The bitwise facts were measured up to here; larger packs are refused on the CPU."""


@dataclass
class Segment:
    """One microbatch of one run in a pass: its sequences, its adapter, and what the layers leave for it.

    On a GPU, several microbatches whose adapters have one config (`engine.stacks`): J of them.
    """

    sequences: list[Tensor]  # int64 token ids
    weights: Weights | None = None  # its adapter's, or those of J; None: the base alone
    dropout: Dropout | None = None
    caches: list[KeyValueCache] | None = None  # one a sequence, while sampling
    rows: Rows | None = None  # which rows are whose; None: all are one microbatch's
    aux_losses: dict[int, Tensor] = field(default_factory=dict)  # layer -> [J]
    expert_loads: dict[int, Tensor] = field(default_factory=dict)  # layer -> int64 [J, E]

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence) for sequence in self.sequences)

    @property
    def effort(self) -> int:
        """How long it takes on a CPU, in tokens of the base: each pair of matrices does, however few its tokens are."""
        return self.num_tokens + (self.weights.layout.num_pairs // PAIRS if self.weights is not None else 0)

    @property
    def aux_loss(self) -> Tensor | None:
        """The routers' auxiliary losses [J], averaged over layers, while the pass is under way; None without any."""
        return torch.stack(list(self.aux_losses.values())).mean(0) if self.aux_losses else None

    @cached_property
    def groups(self) -> Groups:
        """The rows of each microbatch, for the LoRA that each has."""
        return Slices(0, [self.num_tokens]) if self.rows is None else self.rows.groups

    def sequence_caches(self) -> Sequence[KeyValueCache | None]:
        """One entry a sequence."""
        return self.caches or [None] * len(self.sequences)

    def narrowings(
        self, layer: int, input_name: str, *, of_experts: bool = False
    ) -> list[tuple[tuple[str, ...], Parameter]]:
        """Modules that read an input and their A, whose slots are neighbours: (J,) M·R, D.

        Those without experts; or those with, whose A is M, E, R, D and in no stack.
        """
        if self.weights is None:
            return []
        slots = self.weights.layout.narrowings.get((layer, input_name), {})
        return [(m, self.weights.of_slot(slot)) for m, slot in slots.items() if self.has_experts(m[0]) == of_experts]

    def has_experts(self, module: str) -> bool:
        """Whether each expert of this segment's adapter has a LoRA beside `module`."""
        return self.weights is not None and module in self.weights.layout.expert_modules

    @property
    def is_mixture(self) -> bool:
        return self.weights is not None and self.weights.config.is_mixture

    @property
    def scaling(self) -> float:
        """s of LoRA, and dropout's 1 / (1 - p)."""
        assert self.weights is not None
        kept = 1 - self.dropout.probability if self.dropout else 1.0
        return self.weights.config.scaling / kept

    def parameter(self, layer: int, module: str, matrix: str) -> Parameter:
        assert self.weights is not None
        return self.weights.parameter(layer, module, matrix)

    def drop(self, x_nD: Tensor, layer: int, input_name: str) -> Dropped:
        """This segment's own rows with its dropout applied."""
        return Dropped.of(x_nD, None if self.dropout is None else self.dropout.of_input(layer, input_name, x_nD))


@dataclass
class Batch:
    """The packed pass: `tokens` and `positions` int64 [T]; T is a multiple of ROW_MULTIPLE."""

    tokens: Tensor
    positions: Tensor
    segments: list[Segment]
    lengths: list[int]  # of every sequence, the padding last
    sizes: list[int]  # tokens of every segment, the padding last

    def split(self, packed: Tensor) -> Iterator[tuple[int, Segment | None, Tensor]]:
        """(first row, segment, slice [size, …]) of a packed tensor [T, …]; None stands for the padding."""
        starts = accumulate(self.sizes[:-1], initial=0)
        return zip(starts, [*self.segments, None], packed.split(self.sizes), strict=True)

    def sequence_caches(self) -> list[KeyValueCache | None]:
        """One entry a sequence, the padding last."""
        return [*(cache for segment in self.segments for cache in segment.sequence_caches()), None]

    @cached_property
    def boundaries(self) -> Tensor:
        """The first row of every sequence, and T: int32 [sequences + 1] on the pass's device."""
        ends = accumulate(length for length in self.lengths if length)
        return to_device(torch.tensor([0, *ends], dtype=torch.int32), self.tokens.device)


def pack(segments: Sequence[Segment], device: torch.device) -> Batch:
    """Lay the segments end to end and pad the end; positions go on from what a sequence's cache holds."""
    sequences = [sequence for segment in segments for sequence in segment.sequences]
    caches = [cache for segment in segments for cache in segment.sequence_caches()]
    starts = [cache.length if cache else 0 for cache in caches]
    total = sum(len(sequence) for sequence in sequences)
    padding = -total % ROW_MULTIPLE
    assert 0 < total + padding <= MAX_PACKED_TOKENS, f"a pass of {total} tokens"
    tail = torch.zeros(padding, dtype=torch.int64)
    positions = [torch.arange(start, start + len(seq)) for start, seq in zip(starts, sequences, strict=True)]
    return Batch(
        tokens=to_device(torch.cat([*sequences, tail]), device),
        positions=to_device(torch.cat([*positions, torch.arange(padding)]), device),
        segments=list(segments),
        lengths=[*(len(sequence) for sequence in sequences), padding],
        sizes=[*(segment.num_tokens for segment in segments), padding],
    )
