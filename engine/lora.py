"""LoRA beside a frozen linear module: y = xW' + s·dropout(x)A'B' (docs/design.md §3).

Legend: T packed tokens, n rows of a group, D input width, O output width, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.passes import Pass
from engine.segments import Segment


@dataclass(frozen=True)
class Group:
    """Rows that share one pair A [R, D], B [O, R]: a segment's, or an expert's."""

    start: int  # of its rows in the output
    x_nD: Tensor  # its input, after dropout
    a_RD: Tensor
    b_OR: Tensor
    scaling: float

    @classmethod
    def of(
        cls, start: int, x_nD: Tensor, segment: Segment, layer: int, module: str, expert: int | None = None
    ) -> "Group":
        assert segment.adapter is not None
        a_RD, b_OR = (segment.parameter(layer, module, matrix, expert) for matrix in "AB")
        return cls(start, x_nD, a_RD, b_OR, segment.adapter.config.scaling)


def add_lora(y: Tensor, groups: Sequence[Group]) -> Tensor:
    """y[rows] += s·xA'B' for each group, in place; the other rows keep their bits. Matmuls run in y's dtype.

    Semantics: y [m, O] -> [m, O]; the rows of a group are `start` to `start + n`. A slice, never a mask: what is
    not a number in one group reaches no other.
    """
    tensors = [tensor for group in groups for tensor in (group.x_nD, group.a_RD, group.b_OR)]
    places = [(group.start, group.start + len(group.x_nD), group.scaling) for group in groups]
    return _AddLora.apply(y, places, *tensors) if groups else y


class _AddLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, places: list[tuple[int, int, float]], *tensors: Tensor) -> Tensor:
        ctx.places = places
        lows = []
        for (start, stop, scaling), x_nD, a_RD, b_OR in zip(
            places, tensors[::3], tensors[1::3], tensors[2::3], strict=True
        ):
            low_nR = F.linear(x_nD, a_RD.to(y.dtype)).mul_(scaling)
            y[start:stop].addmm_(low_nR, b_OR.to(y.dtype).t())
            lows.append(low_nR)
        ctx.save_for_backward(*tensors, *lows)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        g, saved = gradients[0], ctx.saved_tensors  # read once: a checkpoint recomputes it when it is read
        tensors, lows = saved[: 3 * len(ctx.places)], saved[3 * len(ctx.places) :]
        results: list[Tensor | None] = []
        for index, ((start, stop, scaling), low_nR) in enumerate(zip(ctx.places, lows, strict=True)):
            x_nD, a_RD, b_OR = tensors[3 * index : 3 * index + 3]
            g_nO = g[start:stop]
            g_low_nR = (g_nO @ b_OR.to(g.dtype)).mul_(scaling)
            results.append(g_low_nR @ a_RD.to(g.dtype) if ctx.needs_input_grad[2 + 3 * index] else None)
            results.append((g_low_nR.t() @ x_nD).to(a_RD.dtype))
            results.append((g_nO.t() @ low_nR).to(b_OR.dtype))
        return g, None, *results


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
        batch = self.pass_.batch
        groups = []
        for start, segment, x_nD in batch.split(x[0]):
            if segment is not None and segment.has_lora(self.module):
                dropped = self.pass_.dropped(x_nD, segment, self.layer, self.input_name)
                groups.append(Group.of(start, dropped, segment, self.layer, self.module))
        return add_lora(self.frozen(x)[0], groups)[None]
