"""torch's fused AdamW over one flat float32 vector, with the state where a recovery point finds it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw


@dataclass
class AdamW:
    """The moments of one run, float32 [size] each, and the number of steps taken."""

    first: Tensor
    second: Tensor
    step: int = 0

    @classmethod
    def zeros_like(cls, flat: Tensor) -> "AdamW":
        return cls(torch.zeros_like(flat), torch.zeros_like(flat))

    @torch.no_grad()
    def update(
        self,
        flat: Tensor,
        gradient: Tensor,
        *,
        learning_rate: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        max_grad_norm: float,
        faster: slice | None = None,
        ratio: float = 1.0,
    ) -> float:
        """One decoupled-decay Adam step on `flat`, in place; returns the gradient's norm before clipping.

        There is no step, and nothing changes, where the norm is not finite.
        `max_grad_norm` 0 clips nothing. `gradient` is scaled in place. The parameters `faster` have the learning
        rate times `ratio` (LoRA+).
        """
        norm = float(torch.linalg.vector_norm(gradient))
        if not math.isfinite(norm):
            return norm
        if 0 < max_grad_norm < norm:
            gradient.mul_(max_grad_norm / (norm + 1e-6))
        for part, rate in _rates(len(flat), learning_rate, faster, ratio):
            adamw(
                [flat[part]],
                [gradient[part]],
                [self.first[part]],
                [self.second[part]],
                max_exp_avg_sqs=[],
                state_steps=[torch.full((), float(self.step), device=flat.device)],
                fused=True,
                amsgrad=False,
                maximize=False,
                lr=rate,
                beta1=betas[0],
                beta2=betas[1],
                eps=eps,
                weight_decay=weight_decay,
            )
        self.step += 1
        return norm


def _rates(size: int, learning_rate: float, faster: slice | None, ratio: float) -> list[tuple[slice, float]]:
    if faster is None or ratio == 1:
        return [(slice(0, size), learning_rate)]
    before, after = slice(0, faster.start), slice(faster.stop, size)
    return [(before, learning_rate), (faster, learning_rate * ratio), (after, learning_rate)]
