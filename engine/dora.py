"""DoRA: y = m/‖W + s·BA‖ ∘ (xW' + s·dropout(x)A'B'), the norm taken as a constant (docs/design.md §3).

Legend: T packed tokens, n rows of a group, D input width, O output width, R rank, E experts (absent beside LoRA).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.adapter import Parameter
from engine.lanes import one_thread


@dataclass(frozen=True)
class Magnitude:
    """What scales the outputs of one module: factor = m / norm, float32 [O]."""

    parameter: Parameter
    norm_O: Tensor
    factor_O: Tensor

    @classmethod
    def of(cls, parameter: Parameter, norm_O: Tensor) -> "Magnitude":
        return cls(parameter, norm_O, parameter.precise / norm_O)

    def apply(self, z_nO: Tensor) -> Tensor:
        """In float32: the factor is 1 and a little, which bfloat16 would round to 1."""
        return (z_nO * self.factor_O).to(z_nO.dtype)

    def backward(self, g_nO: Tensor, z_nO: Tensor) -> Tensor:
        """Accumulates m's gradient; returns the gradient at z."""
        self.parameter.accumulate((g_nO * z_nO).sum(0, dtype=self.norm_O.dtype) / self.norm_O)
        return self.apply(g_nO)


@dataclass(frozen=True)
class Group:
    """Rows `start` to `stop` of a pack that share a magnitude."""

    start: int
    stop: int
    magnitude: Magnitude


def row_norm(frozen: nn.Linear) -> Tensor:
    """‖W_o‖ of each output, float32 [O]."""
    weight_OD = frozen.weight
    return torch.linalg.vector_norm(weight_OD, dim=1, dtype=torch.promote_types(weight_OD.dtype, torch.float32))


@one_thread()  # several part long sums of few rows: two give a norm of rank 6 other bits than one, on one EPYC
def norm(frozen: nn.Linear, frozen_norm_O: Tensor, a: Parameter, b: Parameter, scaling: float) -> Tensor:
    """‖W_o + s·(BA)_o‖ of each output, float32 [O] or [E, O], from ‖W_o‖, W A' and A A'; W + s·BA is never made."""
    in_width = a.value.shape[-1]
    cross_ERO = F.linear(a.value.view(-1, in_width), frozen.weight).view(b.value.shape).to(frozen_norm_O.dtype)
    gram_ERR = a.precise @ a.precise.mT
    b_ERO = b.precise
    inner_EO = (b_ERO * cross_ERO).sum(-2)
    square_EO = (b_ERO * (gram_ERR @ b_ERO)).sum(-2)
    return (frozen_norm_O.square() + 2 * scaling * inner_EO + scaling**2 * square_EO).clamp_min(0).sqrt()


def scale(anchor: Tensor, y_TO: Tensor, bias_O: Tensor | None, groups: Sequence[Group]) -> Tensor:
    """y[rows] = factor ∘ (y[rows] - bias) + bias for each group, in place."""
    return _Scale.apply(anchor, y_TO, bias_O, groups) if groups else y_TO


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, y_TO: Tensor, bias_O: Tensor | None, groups: Sequence[Group]) -> Tensor:
        zs = []
        for group in groups:
            rows_nO = y_TO[group.start : group.stop]
            z_nO = rows_nO.clone() if bias_O is None else rows_nO - bias_O
            scaled_nO = group.magnitude.apply(z_nO)
            rows_nO.copy_(scaled_nO if bias_O is None else scaled_nO + bias_O)
            zs.append(z_nO)
        ctx.groups, ctx.zs = groups, zs
        ctx.mark_dirty(y_TO)
        return y_TO

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        g_TO = gradients[0].clone()
        kept, ctx.groups, ctx.zs = zip(ctx.groups, ctx.zs, strict=True), None, None
        for group, z_nO in kept:
            rows_nO = g_TO[group.start : group.stop]
            rows_nO.copy_(group.magnitude.backward(rows_nO, z_nO))
        return None, g_TO, None, None
