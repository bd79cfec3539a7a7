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
    ) -> float:
        """One decoupled-decay Adam step on `flat`, in place; returns the gradient's norm before clipping.

        `max_grad_norm` 0 clips nothing. `gradient` is scaled in place.
        """
        norm = float(torch.linalg.vector_norm(gradient))
        if 0 < max_grad_norm < norm:
            gradient.mul_(max_grad_norm / (norm + 1e-6))
        self.step += 1
        self.first.lerp_(gradient, 1 - betas[0])
        self.second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
        correction_1 = 1 - betas[0] ** self.step
        correction_2 = 1 - betas[1] ** self.step
        if weight_decay:
            flat.mul_(1 - learning_rate * weight_decay)
        denominator = (self.second.sqrt() / correction_2**0.5).add_(eps)
        flat.addcdiv_(self.first, denominator, value=-learning_rate / correction_1)
        return norm
