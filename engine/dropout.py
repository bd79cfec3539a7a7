"""Which elements of an adapter's inputs are dropped: of each microbatch a function of its key (docs/design.md §3).

On a CPU that is a list of elements for each input, and for each expert: few numbers are drawn. On a GPU it is a mask,
drawn there for all inputs of a layer at once, and a slot's mask does not depend on where it lies.

Legend: n a segment's tokens, K active experts, N their slots sorted by expert, m those of a block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from engine.device import to_device
from engine.grouped import Groups
from engine.random import DropoutKey


@dataclass(frozen=True)
class Dropped:
    """An input of an adapter after dropout, not yet scaled by 1 / (1 - p): that is a factor of the output."""

    x: Tensor
    drops: Tensor | None  # the elements of x that are 0: int64, or a mask of x's shape; None: there is no dropout

    @classmethod
    def of(cls, x: Tensor, drops: Tensor | None) -> "Dropped":
        """A copy of `x` without those elements; `x` itself where there is no dropout."""
        if drops is None:
            return cls(x, None)
        if drops.dtype is torch.bool:
            return cls(x.masked_fill(drops, 0), drops)
        return cls.of_(x.clone(memory_format=torch.contiguous_format), drops)

    @classmethod
    def of_(cls, x: Tensor, drops: Tensor | None) -> "Dropped":
        """`x` without those elements, in place."""
        dropped = cls(x, drops)
        dropped._drop_(x)
        return dropped

    def backward_(self, gradient: Tensor) -> Tensor:
        """The gradient at the input, in place of the one at `x`."""
        return self._drop_(gradient)

    def _drop_(self, tensor: Tensor) -> Tensor:
        if self.drops is None:
            return tensor
        if self.drops.dtype is torch.bool:
            return tensor.masked_fill_(self.drops, 0)
        tensor.view(-1).index_fill_(0, self.drops, 0)
        return tensor


class Dropout(Protocol):
    """What is dropped of a segment's inputs, as `Dropped` has it."""

    @property
    def probability(self) -> float: ...

    def of_input(self, layer: int, input_name: str, x_nD: Tensor) -> Tensor:
        """Of an input that modules share."""

    def of_experts(self, layer: int, input_name: str, h_mF: Tensor, groups: Groups, slot_m: Tensor) -> Tensor:
        """Of the inputs of a block of places, which are those slots'; each expert's are its own."""


@dataclass(frozen=True)
class Drops:
    """On a CPU."""

    key: DropoutKey

    @property
    def probability(self) -> float:
        return self.key.probability

    def of_input(self, layer: int, input_name: str, x_nD: Tensor) -> Tensor:
        return to_device(self.key.dropped(layer, {input_name: x_nD.numel()}), x_nD.device)

    def of_experts(self, layer: int, input_name: str, h_mF: Tensor, groups: Groups, slot_m: Tensor) -> Tensor:
        width = h_mF.shape[1]
        sizes = {f"{input_name}.{expert}": (rows.stop - rows.start) * width for expert, rows in groups.shares}
        return to_device(self.key.dropped(layer, sizes), h_mF.device)


@dataclass
class Masks:
    """On a GPU: of several microbatches, one after the other."""

    keys: Sequence[DropoutKey]
    sizes: Sequence[int]  # tokens of each
    widths: Mapping[str, int]  # of a token's inputs: of an expert's input K times
    device: torch.device
    _drawn: tuple[int, Tensor] | None = None

    @property
    def probability(self) -> float:
        return self.keys[0].probability

    def of_input(self, layer: int, input_name: str, x_nD: Tensor) -> Tensor:
        return self._mask(layer)[:, self._columns[input_name]]

    def of_experts(self, layer: int, input_name: str, h_mF: Tensor, groups: Groups, slot_m: Tensor) -> Tensor:
        slots = self._mask(layer)[:, self._columns[input_name]].reshape(-1, h_mF.shape[1])
        return slots.index_select(0, slot_m)

    def _mask(self, layer: int) -> Tensor:
        """Of all inputs of a layer [n, Σ widths], kept until another layer asks."""
        if self._drawn is None or self._drawn[0] != layer:
            mask = torch.empty(sum(self.sizes), sum(self.widths.values()), dtype=torch.bool, device=self.device)
            for key, rows in zip(self.keys, mask.split(list(self.sizes)), strict=True):
                key.fill_(rows, layer)
            self._drawn = layer, mask
        return self._drawn[1]

    @cached_property
    def _columns(self) -> dict[str, slice]:
        ends = accumulate(self.widths.values())
        return {name: slice(end - width, end) for (name, width), end in zip(self.widths.items(), ends, strict=True)}
