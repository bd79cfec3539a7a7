"""The head and the losses: named functions of log-probs, summed, never divided (docs/design.md §3).

Legend: T packed tokens, N targets of the pack, D hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.segments import ROW_MULTIPLE

CHUNK_ROWS = 256
"""Rows of the head at a time: the logits of a whole pack are never in memory."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""(log-probs [N], per-token weights [N]) -> losses [N]."""

LOSSES: dict[str, Loss] = {"cross_entropy": lambda logprobs, weights: -weights * logprobs}

Head = Callable[[Tensor], Tensor]
"""Hidden rows [n, D] -> logits [n, V]."""


def target_logprobs(
    hidden_TD: Tensor, head: Head, rows_N: Tensor, targets_N: Tensor, weights_N: Tensor, loss: Loss
) -> tuple[Tensor, Tensor]:
    """The summed loss (a scalar to call backward on) and log p(target) [N] in float32 (float64 on a float64 base)."""
    return _TargetLoss.apply(hidden_TD, head, rows_N, targets_N, weights_N, loss)


class _TargetLoss(torch.autograd.Function):
    """Computes the gradient at the hidden states on the way forward, chunk by chunk, since the loss is a sum."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        head: Head,
        rows_N: Tensor,
        targets_N: Tensor,
        weights_N: Tensor,
        loss: Loss,
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0]
        gradient_TD = torch.zeros_like(hidden_TD) if wanted else None
        logprobs, losses = [], []
        for rows, targets, weights in zip(
            rows_N.split(CHUNK_ROWS), targets_N.split(CHUNK_ROWS), weights_N.split(CHUNK_ROWS), strict=True
        ):
            with torch.set_grad_enabled(wanted):
                hidden = F.pad(hidden_TD.detach()[rows], (0, 0, 0, -len(rows) % ROW_MULTIPLE)).requires_grad_(wanted)
                logits = head(hidden)[: len(rows)]
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                logprob = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
                chunk_losses = loss(logprob, weights.to(logprob.dtype))
                total = chunk_losses.sum()
            if gradient_TD is not None:
                (gradient,) = torch.autograd.grad(total, hidden)
                gradient_TD.index_copy_(0, rows, gradient[: len(rows)])
            logprobs.append(logprob.detach())
            losses.append(chunk_losses.detach())
        ctx.gradient_TD = gradient_TD
        all_logprobs = torch.cat(logprobs)
        ctx.mark_non_differentiable(all_logprobs)
        return torch.cat(losses).sum(), all_logprobs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.gradient_TD * gradients[0].to(ctx.gradient_TD.dtype), None, None, None, None, None
