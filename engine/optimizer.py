"""AdamW over one flat float32 vector: one pass each for clipping, moments, decay and the update."""

from dataclasses import dataclass

import torch
from torch import Tensor


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

        `max_grad_norm` 0 clips nothing. `gradient` is scaled in place. The parameters `faster` have the learning
        rate times `ratio` (LoRA+).
        """
        norm = float(torch.linalg.vector_norm(gradient))
        if 0 < max_grad_norm < norm:
            gradient.mul_(max_grad_norm / (norm + 1e-6))
        self.step += 1
        self.first.lerp_(gradient, 1 - betas[0])
        self.second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
        correction_1 = 1 - betas[0] ** self.step
        correction_2 = 1 - betas[1] ** self.step
        denominator = (self.second.sqrt() / correction_2**0.5).add_(eps)
        for part, rate in _rates(len(flat), learning_rate, faster, ratio):
            if weight_decay:
                flat[part].mul_(1 - rate * weight_decay)
            flat[part].addcdiv_(self.first[part], denominator[part], value=-rate / correction_1)
        return norm


def _rates(size: int, learning_rate: float, faster: slice | None, ratio: float) -> list[tuple[slice, float]]:
    if faster is None or ratio == 1:
        return [(slice(0, size), learning_rate)]
    before, after = slice(0, faster.start), slice(faster.stop, size)
    return [(before, learning_rate), (faster, learning_rate * ratio), (after, learning_rate)]
