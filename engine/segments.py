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
from engine.random import DropoutKey

ROW_MULTIPLE = 16
"""A matmul's rows do not depend on the other rows when their number is a multiple of this (docs/design.md §3)."""
FEWEST_ROWS = 32
"""Of a segment whose bits do not depend on the number of threads; of fewer (6, say) they may."""
MAX_PACKED_TOKENS = 8192
"""The bitwise facts were measured up to here; larger packs are refused on the CPU."""


@dataclass(frozen=True)
class Dropped:
    """An input of an adapter after dropout, not yet scaled by 1 / (1 - p): that is a factor of the output."""

    x: Tensor
    places: Tensor | None  # the elements of x that are 0: int64, or a mask of x's shape; None: there is no dropout

    @classmethod
    def of(cls, x: Tensor, places: Tensor | None) -> "Dropped":
        """A copy of `x` without those elements; `x` itself where there is no dropout."""
        return cls(x if places is None else _zero_(x.clone(memory_format=torch.contiguous_format), places), places)

    def backward_(self, gradient: Tensor) -> Tensor:
        """The gradient at the input, in place of the one at `x`."""
        return gradient if self.places is None else _zero_(gradient, self.places)


def _zero_(x: Tensor, places: Tensor) -> Tensor:
    if places.dtype is torch.bool:
        return x.masked_fill_(places, 0)
    x.view(-1).index_fill_(0, places, 0)
    return x


@dataclass
class Segment:
    """One microbatch of one run in a pass: its sequences, its adapter, and what the layers leave for it."""

    sequences: list[Tensor]  # int64 token ids
    weights: Weights | None = None  # its adapter's; None: the base alone
    dropout: DropoutKey | None = None  # None: no dropout
    caches: list[KeyValueCache] | None = None  # one a sequence, while sampling
    aux_losses: dict[int, Tensor] = field(default_factory=dict)  # layer -> scalar
    expert_loads: dict[int, Tensor] = field(default_factory=dict)  # layer -> int64 [E]

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence) for sequence in self.sequences)

    @property
    def aux_loss(self) -> Tensor | None:
        """The routers' auxiliary loss, averaged over layers, while the pass is under way; None without a router."""
        return torch.stack(list(self.aux_losses.values())).mean() if self.aux_losses else None

    def sequence_caches(self) -> Sequence[KeyValueCache | None]:
        """One entry a sequence."""
        return self.caches or [None] * len(self.sequences)

    def has_lora(self, module: str) -> bool:
        """Whether one LoRA of this segment's adapter sits beside `module`."""
        return self.weights is not None and module in self.weights.layout.lora_modules

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
        return self.weights.parameters[layer, module, matrix]

    def drop(self, x: Tensor, layer: int, input_name: str) -> Dropped:
        """This segment's own rows [n, D] with its dropout applied."""
        places = None if self.dropout is None else self.dropout.dropped(layer, input_name, x.numel())
        return Dropped.of(x, None if places is None else to_device(places, x.device))


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
