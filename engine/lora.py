"""LoRA beside a frozen linear module: y = xW' + s·dropout(x)A'B' (docs/design.md §3).

Legend: T packed tokens, n rows of a group, D input width, O output width, R rank.
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
from engine.grouped import Groups
from engine.passes import Pass
from engine.segments import Segment


@dataclass(frozen=True)
class Group:
    """Rows `start` to `stop` of a pack, a segment's: those of each microbatch share a pair A [J, R, D], B [J, R, O]."""

    start: int
    stop: int
    input: Dropped  # those rows of the input, without gradient
    groups: Groups
    a: Parameter
    b: Parameter
    scaling: float


def add_lora(anchor: Tensor, y_TO: Tensor, x_TD: Tensor, groups: Sequence[Group]) -> Tensor:
    """y[rows] += s·xA'B for each group, in place; the other rows keep their bits.

    The gradients of A and B are added to the parameters' own. A slice, never a mask: what is not a number in one
    group reaches no other.
    """
    return _AddLora.apply(anchor, y_TO, x_TD, groups) if groups else y_TO


class _AddLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, y_TO: Tensor, x_TD: Tensor, groups: Sequence[Group]) -> Tensor:
        lows = []
        for group in groups:
            low_nR = group.groups.narrow(group.input.x, group.a.value).mul_(group.scaling)
            group.groups.add_(y_TO[group.start : group.stop], low_nR, group.b.value)
            lows.append(low_nR)
        ctx.groups, ctx.lows, ctx.input_shape = groups, lows, x_TD.shape
        ctx.mark_dirty(y_TO)
        return y_TO

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g_TO,) = gradients
        g_x_TD = g_TO.new_zeros(ctx.input_shape) if ctx.needs_input_grad[2] else None
        kept, ctx.groups, ctx.lows = zip(ctx.groups, ctx.lows, strict=True), None, None
        for group, low_nR in kept:
            g_nO = g_TO[group.start : group.stop]
            g_low_nR = group.groups.narrow(g_nO, group.b.value).mul_(group.scaling)
            group.groups.accumulate(group.b, low_nR, g_nO)
            group.groups.accumulate(group.a, g_low_nR, group.input.x)
            if g_x_TD is not None:
                rows_nD = g_x_TD[group.start : group.stop]
                group.input.backward_(group.groups.widen(g_low_nR, group.a.value, out=rows_nD))
        return None, g_TO, g_x_TD, None


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
        groups, scales = [], []
        x_TD = x.squeeze(0)  # not x[0], whose backward fills a tensor with zeros first
        for start, segment, x_nD in self.pass_.batch.split(x_TD.detach()):
            if segment is None or not segment.has_lora(self.module):
                continue
            stop = start + len(x_nD)
            input_ = self.pass_.dropped(x_nD, segment, self.layer, self.input_name)
            a, b = (segment.parameter(self.layer, self.module, matrix).of_groups() for matrix in "AB")
            groups.append(Group(start, stop, input_, segment.groups, a, b, segment.scaling))
            scales += [dora.Group(start, stop, magnitude) for magnitude in self.magnitudes(segment)]
        y = add_lora(self.pass_.anchor, self.frozen(x_TD), x_TD, groups)
        return dora.scale(self.pass_.anchor, y, self.frozen.bias, scales)[None]

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
        return [dora.Magnitude.of(m.expert(expert), norm[expert]) for expert in range(len(norm))]

    @cached_property
    def frozen_norm_O(self) -> Tensor:
        """‖W_o‖ of each output, float32: what DoRA's magnitudes begin with."""
        return dora.row_norm(self.frozen)
