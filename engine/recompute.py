"""Recomputation (activation checkpointing; Chen et al. 2016, arXiv:1604.06174) of decoder layers, to the same bits.

A pass keeps of a layer its input alone, and runs the layer again when the backward comes to it: one more forward in
time, and in memory one layer at a time instead of all. What is random is a function of its key, so the second run is
the first one again. PyTorch's own checkpoints do not fit: those without reentrance work by hooks on saved tensors, of
which the engine's functions keep only a few; the others know nothing of the routers' losses.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.passes import Pass
from engine.segments import Segment


class Recompute:
    """Takes the place of a decoder layer's `forward`: the same outputs and gradients."""

    def __init__(self, forward: Callable[..., Tensor], pass_: Pass, layer: int):
        self.forward = forward
        self.pass_ = pass_
        self.layer = layer

    def __call__(self, x: Tensor, **arguments: Any) -> Tensor:
        """[1, T, D] -> [1, T, D]; of the arguments only `x` has a gradient."""
        y, *losses = _Recompute.apply(self.pass_.anchor, x, self, arguments)
        for segment, loss in zip(self._mixtures(), losses, strict=True):
            segment.aux_losses[self.layer] = loss
        return y

    def outputs(self, x: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        """What the layer gives, and the auxiliary losses that it left with the pass's mixtures, taken from there."""
        y = self.forward(x, **arguments)
        return y, *(segment.aux_losses.pop(self.layer) for segment in self._mixtures())

    def _mixtures(self) -> list[Segment]:
        return [segment for segment in self.pass_.batch.segments if segment.is_mixture]


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, layer: Recompute, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x)
        ctx.layer, ctx.arguments, ctx.batch = layer, arguments, layer.pass_.batch
        return layer.outputs(x, arguments)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x = ctx.saved_tensors[0].detach().requires_grad_(ctx.needs_input_grad[1])
        with ctx.layer.pass_.resumed(ctx.batch):
            with torch.enable_grad():
                outputs = ctx.layer.outputs(x, ctx.arguments)
            torch.autograd.backward(outputs, gradients)
        return None, x.grad, None, None
