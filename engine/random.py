"""Random numbers as pure functions of a key: nothing depends on what else was drawn, so nothing must be kept.

Draws are made on the CPU's generator and are the same on every device.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


def generator(*key: object) -> torch.Generator:
    """A fresh generator, seeded by a hash of the key."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


@dataclass(frozen=True)
class DropoutKey:
    """One microbatch of one run: together with a layer and an input it names a mask (docs/design.md §3)."""

    seed: int
    step: int
    microbatch: int
    probability: float

    def mask(self, layer: int, input_name: str, like: Tensor) -> Tensor:
        """A mask of `like`'s shape and dtype: 0 with the probability p (to 1 in 65,536), else 1 / (1 - p).

        Four elements are made of one 64-bit draw: drawing costs as much as a matmul of small rank.
        """
        draws = torch.empty((like.numel() + 3) // 4, dtype=torch.int64)
        draws.random_(-(2**63), None, generator=generator(self.seed, self.step, self.microbatch, layer, input_name))
        threshold = min(round(self.probability * 65536), 65535) - 32768  # never all of them
        kept = draws.view(torch.int16)[: like.numel()].view(like.shape) >= threshold
        return kept.to(like.device).to(like.dtype).mul_(65536 / (32768 - threshold))
