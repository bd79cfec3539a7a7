"""torch's fused AdamW over one flat float32 vector, with the state where a recovery point finds it."""

import math
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

        There is no step, and nothing changes, where the norm is not finite.
        `max_grad_norm` 0 clips nothing. `gradient` is scaled in place. The parameters `faster` have the learning
        rate times `ratio` (LoRA+).
        """
        norm = float(torch.linalg.vector_norm(gradient))
        if not math.isfinite(norm):
            return norm
        if 0 < max_grad_norm < norm:
            gradient.mul_(max_grad_norm / (norm + 1e-6))
        parts = _rates(len(flat), learning_rate, faster, ratio)
        parameters = [flat[part] for part, _ in parts]
        groups = [{"params": [p], "lr": rate} for p, (_, rate) in zip(parameters, parts, strict=True)]
        optimizer = torch.optim.AdamW(groups, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        for parameter, (part, _) in zip(parameters, parts, strict=True):
            parameter.grad = gradient[part]
            optimizer.state[parameter] = {
                "step": torch.tensor(float(self.step), device=flat.device),
                "exp_avg": self.first[part],
                "exp_avg_sq": self.second[part],
            }
        optimizer.step()
        self.step += 1
        return norm


def _rates(size: int, learning_rate: float, faster: slice | None, ratio: float) -> list[tuple[slice, float]]:
    if faster is None or ratio == 1:
        return [(slice(0, size), learning_rate)]
    before, after = slice(0, faster.start), slice(faster.stop, size)
    return [(before, learning_rate), (faster, learning_rate * ratio), (after, learning_rate)]
