"""LoRA beside a frozen linear module: y = xW' + s·dropout(x)A'B' (docs/design.md §3).

Legend: T packed tokens, n rows of a segment, D input width, O output width, R rank, J microbatches of a segment.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from engine import dora
from engine.adapter import Parameter
from engine.dropout import Dropped
from engine.passes import Pass
from engine.segments import Segment


@dataclass
class Narrowed:
    """Rows `start` to `stop` of a pack, a segment's, after the A of modules that read one input, M of them at once."""

    start: int
    stop: int
    segment: Segment
    modules: tuple[str, ...]
    input: Dropped  # those rows of the input, without gradient
    a: Parameter  # [M·R, D], or [J, M·R, D] of J microbatches
    low_nX: Tensor  # s·A dropout(x), X = M·R

    @classmethod
    def of(cls, start: int, segment: Segment, modules: tuple[str, ...], input_: Dropped, a: Parameter) -> "Narrowed":
        low_nX = segment.groups.narrow(input_.x, a).mul_(segment.scaling)
        return cls(start, start + len(low_nX), segment, modules, input_, a, low_nX)

    @cached_property
    def g_low_nX(self) -> Tensor:
        """Where the modules' B write the gradient."""
        return torch.empty_like(self.low_nX)

    def backward(self, g_x_TD: Tensor | None) -> None:
        """Once they have: adds to the gradients of A and, in place, at x, which is 0 where elements are dropped."""
        groups, g_low_nX = self.segment.groups, self.g_low_nX.mul_(self.segment.scaling)
        groups.accumulate(self.a, g_low_nX, self.input.x)
        if g_x_TD is not None:
            rows_nD = g_x_TD[self.start : self.stop]
            groups.add_(rows_nD, g_low_nX, self.a)
            self.input.backward_(rows_nD)

    def columns(self, module: str) -> slice:
        """A module's own R of the X."""
        rank, place = self.a.value.shape[-2] // len(self.modules), self.modules.index(module)
        return slice(place * rank, (place + 1) * rank)


@dataclass(frozen=True)
class Group:
    """What was narrowed for one module, and the B that widens it."""

    narrowed: Narrowed
    columns: slice
    b: Parameter  # [R, O], or [J, R, O]

    @property
    def rows(self) -> slice:
        return slice(self.narrowed.start, self.narrowed.stop)

    def add_(self, y_TO: Tensor) -> None:
        """y[rows] += s·xA'B."""
        groups, low_nR = self.narrowed.segment.groups, self.narrowed.low_nX[:, self.columns]
        groups.add_(y_TO[self.rows], low_nR, self.b)

    def backward(self, g_TO: Tensor) -> None:
        """Adds to B's gradient; writes that at what was narrowed."""
        groups, g_nO = self.narrowed.segment.groups, g_TO[self.rows]
        groups.narrow(g_nO, self.b, out=self.narrowed.g_low_nX[:, self.columns])
        groups.accumulate(self.b, self.narrowed.low_nX[:, self.columns], g_nO)


class _Narrow(torch.autograd.Function):
    """The A of all modules that read x. What it gives is empty: the modules' B take it, so that they go back first."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x_TD: Tensor, narrowed: list[Narrowed]) -> Tensor:
        ctx.narrowed, ctx.input_shape = narrowed, x_TD.shape
        return x_TD.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        g_x_TD = gradients[0].new_zeros(ctx.input_shape) if ctx.needs_input_grad[1] else None
        kept, ctx.narrowed = ctx.narrowed, None
        for narrowed in kept:
            narrowed.backward(g_x_TD)
        return None, g_x_TD, None


class _AddLora(torch.autograd.Function):
    """y[rows] += s·xA'B for each group, in place; the other rows keep their bits.

    The gradients of A and B are added to the parameters' own. A slice, never a mask: what is not a number in one
    group reaches no other.
    """

    @staticmethod
    def forward(ctx: Any, narrow: Tensor, y_TO: Tensor, groups: Sequence[Group]) -> Tensor:
        for group in groups:
            group.add_(y_TO)
        ctx.groups = groups
        ctx.mark_dirty(y_TO)
        return y_TO

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kept, ctx.groups = ctx.groups, None
        for group in kept:
            group.backward(gradients[0])
        return None, gradients[0], None


class LoraLinear(nn.Module):
    """A frozen linear module, run once over the whole pack, with each segment's own LoRA added to its rows."""

    def __init__(self, frozen: nn.Linear, pass_: Pass, layer: int, module: str, input_name: str):
        super().__init__()
        self.frozen = frozen
        self.pass_ = pass_
        self.layer = layer
        self.module = module
        self.input_name = input_name

    def forward(self, x: Tensor) -> Tensor:
        """[1, T, D] -> [1, T, O]."""
        return self.rows(x.squeeze(0))[None]  # not x[0], whose backward fills a tensor with zeros first

    def rows(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, O]."""
        narrow, narrowed = self.pass_.shared((self.layer, self.input_name), lambda: self._narrow(x_TD))
        groups, scales = [], []
        for part in narrowed:
            if self.module not in part.modules:
                continue
            b = part.segment.parameter(self.layer, self.module, "B")
            groups.append(Group(part, part.columns(self.module), b))
            scales += [dora.Group(part.start, part.stop, magnitude) for magnitude in self.magnitudes(part.segment)]
        y = self.frozen(x_TD)
        if groups:
            y = _AddLora.apply(narrow, y, groups)
        return dora.scale(self.pass_.anchor, y, self.frozen.bias, scales)

    def _narrow(self, x_TD: Tensor) -> tuple[Tensor, list[Narrowed]]:
        """For all modules that read x, of which the first asks."""
        narrowed = []
        for start, segment, x_nD in self.pass_.batch.split(x_TD.detach()):
            narrowings = segment.narrowings(self.layer, self.input_name) if segment is not None else []
            if segment is None or not narrowings:
                continue
            input_ = segment.drop(x_nD, self.layer, self.input_name)
            narrowed += [Narrowed.of(start, segment, modules, input_, a) for modules, a in narrowings]
        return _Narrow.apply(self.pass_.anchor, x_TD, narrowed), narrowed

    def magnitudes(self, segment: Segment) -> list[dora.Magnitude]:
        """Of each expert of the segment's adapter, or of its one LoRA; none without DoRA."""
        weights = segment.weights
        if weights is None or not weights.config.dora:
            return []
        key = self.layer, self.module
        if key not in weights.norms:
            a, b = (segment.parameter(*key, matrix) for matrix in "AB")
            weights.norms[key] = dora.norm(self.frozen, self.frozen_norm_O, a, b, weights.config.scaling)
        m, norm = segment.parameter(*key, "m"), weights.norms[key]
        if not segment.has_experts(self.module):
            return [dora.Magnitude.of(m, norm)]
        return [dora.Magnitude.of(part, norm[expert]) for expert, part in enumerate(m.unbound)]

    @cached_property
    def frozen_norm_O(self) -> Tensor:
        """‖W_o‖ of each output, float32: what DoRA's magnitudes begin with."""
        return dora.row_norm(self.frozen)
