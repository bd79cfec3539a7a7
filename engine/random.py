"""Random numbers as pure functions of a key: nothing depends on what else was drawn, so nothing must be kept.

Draws are made on the CPU and are the same on every device; but for dropout a GPU draws by itself.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def generator(*key: object) -> torch.Generator:
    """A fresh generator, seeded by a hash of the key."""
    return torch.Generator().manual_seed(_seed(key))


def _seed(key: tuple[object, ...]) -> int:
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")


@dataclass(frozen=True)
class DropoutKey:
    """One microbatch of one run: together with a layer and an input it names a mask (docs/design.md §3)."""

    seed: int
    step: int
    microbatch: int
    probability: float

    def fill_(self, mask: Tensor, layer: int) -> None:
        """Draws which elements of all inputs of a layer are dropped, on a GPU: bool [n, W].

        On the device, since the CPU's draws take longer than all that a GPU does with them.
        """
        device = mask.device if mask.device.type == "cuda" else "cpu"
        draw = torch.Generator(device).manual_seed(_seed((self.seed, self.step, self.microbatch, layer)))
        mask.bernoulli_(self.probability, generator=draw)

    def dropped(self, layer: int, input_name: str, size: int) -> Tensor:
        """Which of an input's `size` elements are dropped, each with the probability p: int64, ascending.

        Drawn are the gaps between them, which are geometric: at p = 0.05 that is one draw for 20 elements. A draw
        and a comparison for each element cost as much as all matmuls of small rank.
        """
        draws = np.random.Generator(np.random.SFC64(_seed((self.seed, self.step, self.microbatch, layer, input_name))))
        expected = size * self.probability
        enough = math.ceil(expected + 8 * math.sqrt(expected) + 16)  # to pass the end but once in 10^15 draws
        lengths = draws.standard_exponential(enough)
        lengths *= -1 / math.log1p(-self.probability)
        np.fmin(lengths, size, out=lengths)  # of the smallest p they would be larger than any integer
        gaps = lengths.astype(np.int64)
        gaps[1:] += 1
        places = gaps.cumsum(out=gaps)
        return torch.from_numpy(places[: np.searchsorted(places, size)])
