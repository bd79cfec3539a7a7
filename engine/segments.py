"""Microbatches laid end to end in one pass, without padding between them.

Legend: T packed tokens, S segments.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from engine.adapter import Adapter, Leaves, parameter_name
from engine.cache import KeyValueCache
from engine.random import DropoutKey

ROW_MULTIPLE = 16
"""A matmul's rows do not depend on the other rows when their number is a multiple of this (docs/design.md §3)."""
MAX_PACKED_TOKENS = 8192
"""The bitwise facts were measured up to here; larger packs are refused on the CPU."""


@dataclass
class Segment:
    """One microbatch of one run in a pass: its sequences, its adapter, and what the layers leave for it."""

    sequences: list[Tensor]  # int64 token ids
    adapter: Adapter | None = None
    leaves: Leaves | None = None  # the adapter's parameters as this segment's own leaves
    dropout: DropoutKey | None = None  # None: no dropout
    caches: list[KeyValueCache] | None = None  # one a sequence, while sampling
    aux_losses: list[Tensor] = field(default_factory=list)  # scalars, one a layer
    expert_loads: list[Tensor] = field(default_factory=list)  # int64 [E], one a layer

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence) for sequence in self.sequences)

    def sequence_caches(self) -> Sequence[KeyValueCache | None]:
        """One entry a sequence."""
        return self.caches or [None] * len(self.sequences)

    def has_lora(self, module: str) -> bool:
        """Whether one LoRA of this segment's adapter sits beside `module`."""
        return self.adapter is not None and (module, None) in self.adapter.layout.pairs

    def has_experts(self, module: str) -> bool:
        """Whether each expert of this segment's adapter has a LoRA beside `module`."""
        return self.adapter is not None and (module, 0) in self.adapter.layout.pairs

    def parameter(self, layer: int, module: str, matrix: str, expert: int | None = None) -> Tensor:
        assert self.leaves is not None
        return self.leaves.tensors[parameter_name(layer, module, matrix, expert)]

    def drop(self, x: Tensor, layer: int, input_name: str) -> Tensor:
        """This segment's own rows [n, D] with its dropout applied."""
        if self.dropout is None or self.dropout.probability == 0:
            return x
        return x * self.dropout.mask(layer, input_name, x)


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
        tokens=torch.cat([*sequences, tail]).to(device),
        positions=torch.cat([*positions, torch.arange(padding)]).to(device),
        segments=list(segments),
        lengths=[*(len(sequence) for sequence in sequences), padding],
        sizes=[*(segment.num_tokens for segment in segments), padding],
    )
