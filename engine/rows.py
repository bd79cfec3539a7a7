"""Which rows of a segment are whose, where it is of several microbatches (on a GPU).

What is not a number in one microbatch must reach no other, so where rows of all go through one operation those of
each are a group of `grouped`, or a matrix of a batch, padded with rows of zeros.

Legend: n rows, J microbatches, M rows of the longest, E experts of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.device import to_device
from engine.grouped import Together


@dataclass(frozen=True)
class Rows:
    """One microbatch's after the other's."""

    groups: Together
    counts_J: Tensor
    microbatch_n: Tensor
    padded_JM: Tensor  # row of each place, flat; n: a row of zeros
    place_n: Tensor  # row -> its place there
    longest: int

    @classmethod
    def of(cls, sizes: Sequence[int], device: torch.device) -> "Rows":
        counts_J, longest, total = torch.tensor(sizes), max(sizes), sum(sizes)
        microbatch_n = torch.arange(len(sizes)).repeat_interleave(counts_J)
        starts_J = counts_J.cumsum(0) - counts_J
        place_n = microbatch_n * longest + torch.arange(total) - starts_J[microbatch_n]
        padded_JM = torch.full((len(sizes) * longest,), total).index_copy_(0, place_n, torch.arange(total))
        counts_J, microbatch_n, padded_JM, place_n = (
            to_device(index, device) for index in (counts_J, microbatch_n, padded_JM, place_n)
        )
        return cls(Together(microbatch_n, counts_J), counts_J, microbatch_n, padded_JM, place_n, longest)

    def padded(self, x_nD: Tensor) -> Tensor:
        """[J, M, D]."""
        return F.pad(x_nD, (0, 0, 0, 1)).index_select(0, self.padded_JM).view(-1, self.longest, x_nD.shape[1])

    def unpadded(self, x_JMD: Tensor) -> Tensor:
        """[n, D]."""
        return x_JMD.flatten(0, 1).index_select(0, self.place_n)

    def mean(self, x_JMD: Tensor) -> Tensor:
        """Of each microbatch's own rows: [J, D]."""
        nowhere_JM1 = (self.padded_JM == len(self.place_n)).view(-1, self.longest, 1)
        return x_JMD.masked_fill(nowhere_JM1, 0).sum(1) / self.counts_J[:, None]
