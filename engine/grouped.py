"""Products of places, sorted by expert, with each expert's own matrix: the one module that knows how.

On a CPU an expert's places are a slice. torch's grouped matmul multiplies them one after the other, with the bits of a
matmul each, in one call, which lets go of Python's lock once. On a GPU the host would have to wait to know where slices
end. There one matmul serves all experts: torch's grouped one where it has a kernel, else a plain one, in which the
R columns of a place lie among E·R, with 0 in those of the other experts: E times the arithmetic of small matmuls.

Legend: N places, m those of a block, n tokens, R rank, O another width, E experts, X = E·R.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from engine.adapter import Parameter
from engine.device import capability
from engine.dora import Magnitude


class Groups(Protocol):
    """The places of a block, and whose they are."""

    @property
    def shares(self) -> "list[Share]":
        """Each expert's rows; to ask for them on a GPU is to wait."""

    def add_(self, y_mO: Tensor, low_mR: Tensor, w: Parameter) -> None:
        """y += low W, each place with its expert's W; `w`: [E, R, O]."""

    def widen(self, low_mR: Tensor, w: Parameter) -> Tensor:
        """low W [m, O]."""

    def narrow(self, x_mO: Tensor, w: Parameter, out: Tensor | None = None) -> Tensor:
        """x W' [m, R]."""

    def accumulate(self, w: Parameter, low_mR: Tensor, x_mO: Tensor) -> None:
        """Adds low' x of each expert's places to its part of the gradient."""

    def scale(self, z_mO: Tensor, magnitudes: list[Magnitude], out: Tensor) -> None:
        """`Magnitude.apply`, each place with its expert's."""

    def scale_backward_(self, g_mO: Tensor, z_mO: Tensor, magnitudes: list[Magnitude]) -> None:
        """`Magnitude.backward`, in place of g."""


class Share(NamedTuple):
    """One expert's rows within a block."""

    expert: int
    rows: slice


@dataclass(frozen=True)
class Slices:
    """On a CPU: of neighbouring experts, the places of one after those of the other."""

    first: int  # expert
    sizes: Sequence[int]  # places of each

    @cached_property
    def shares(self) -> list[Share]:
        ends = accumulate(self.sizes)
        experts = enumerate(zip(ends, self.sizes, strict=True), self.first)
        return [Share(expert, slice(end - size, end)) for expert, (end, size) in experts if size]

    def add_(self, y_mO: Tensor, low_mR: Tensor, w: Parameter) -> None:
        for expert, y_eO, low_eR in self._split(y_mO, low_mR):
            y_eO.addmm_(low_eR, w.parts[expert].value)

    def widen(self, low_mR: Tensor, w: Parameter) -> Tensor:
        if self._go_together(low_mR, w):
            return grouped_mm(low_mR, w.value[self._mine], offs=self._ends)
        out = low_mR.new_empty(len(low_mR), w.value.shape[-1])
        for expert, low_eR, out_eO in self._split(low_mR, out):
            torch.mm(low_eR, w.parts[expert].value, out=out_eO)
        return out

    def narrow(self, x_mO: Tensor, w: Parameter, out: Tensor | None = None) -> Tensor:
        if out is None and self._go_together(x_mO, w):
            return grouped_mm(x_mO, w.value[self._mine].mT, offs=self._ends)
        out = x_mO.new_empty(len(x_mO), w.value.shape[-2]) if out is None else out
        for expert, x_eO, out_eR in self._split(x_mO, out):
            torch.mm(x_eO, w.transposed[expert], out=out_eR)
        return out

    def accumulate(self, w: Parameter, low_mR: Tensor, x_mO: Tensor) -> None:
        if self._go_together(x_mO, w):
            assert w.gradient is not None
            w.gradient[self._mine].add_(grouped_mm(low_mR.t(), x_mO, offs=self._ends))
            return
        for expert, low_eR, x_eO in self._split(low_mR, x_mO):
            w.parts[expert].accumulate(low_eR.t() @ x_eO)

    def scale(self, z_mO: Tensor, magnitudes: list[Magnitude], out: Tensor) -> None:
        for expert, z_eO, out_eO in self._split(z_mO, out):
            out_eO.copy_(magnitudes[expert].apply(z_eO))

    def scale_backward_(self, g_mO: Tensor, z_mO: Tensor, magnitudes: list[Magnitude]) -> None:
        for expert, g_eO, z_eO in self._split(g_mO, z_mO):
            g_eO.copy_(magnitudes[expert].backward(g_eO, z_eO))

    def _split(self, x_m: Tensor, y_m: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """Each expert with its rows of both; one that is alone has all of them."""
        if len(self.shares) == 1:
            return [(self.shares[0].expert, x_m, y_m)]
        return [(expert, x_m[rows], y_m[rows]) for expert, rows in self.shares]

    def _go_together(self, x_m: Tensor, w: Parameter) -> bool:
        return len(self.shares) > 1 and has_kernel(x_m, w.value)

    @property
    def _mine(self) -> slice:
        return slice(self.first, self.first + len(self.sizes))

    @cached_property
    def _ends(self) -> Tensor:
        return torch.tensor(list(accumulate(self.sizes)), dtype=torch.int32)


@dataclass(frozen=True)
class Together:
    """On a GPU: how many places an expert has is known there alone, so a block is all places."""

    expert_N: Tensor
    loads_E: Tensor

    @property
    def shares(self) -> list[Share]:
        loads, ends = self.loads_E.tolist(), self._ends_E.tolist()
        return [Share(e, slice(end - load, end)) for e, (load, end) in enumerate(zip(loads, ends, strict=True)) if load]

    def add_(self, y_mO: Tensor, low_mR: Tensor, w: Parameter) -> None:
        y_mO.add_(self._product(low_mR, w.value))

    def widen(self, low_mR: Tensor, w: Parameter) -> Tensor:
        return self._product(low_mR, w.value)

    def narrow(self, x_mO: Tensor, w: Parameter, out: Tensor | None = None) -> Tensor:
        w_ERO = w.value
        if has_kernel(x_mO, w_ERO):
            low_mR = grouped_mm(x_mO, w_ERO.mT, offs=self._ends_E)
        else:
            wide_NER = (x_mO @ w_ERO.flatten(0, 1).t()).view(len(x_mO), *w_ERO.shape[:2])
            low_mR = wide_NER.gather(1, self._columns(w_ERO.shape[1])).squeeze(1)
        return low_mR if out is None else out.copy_(low_mR)

    def accumulate(self, w: Parameter, low_mR: Tensor, x_mO: Tensor) -> None:
        if has_kernel(x_mO, w.value):
            gradient_ERO = grouped_mm(low_mR.t(), x_mO, offs=self._ends_E)
            w.accumulate(gradient_ERO.masked_fill_(self._are_empty_E11, 0))
        else:
            w.accumulate(self._wide(low_mR).t() @ x_mO)

    def scale(self, z_mO: Tensor, magnitudes: list[Magnitude], out: Tensor) -> None:
        factor_EO = torch.stack([magnitude.factor_O for magnitude in magnitudes])
        out.copy_(z_mO * factor_EO[self.expert_N])

    def scale_backward_(self, g_mO: Tensor, z_mO: Tensor, magnitudes: list[Magnitude]) -> None:
        mine_EN = self.expert_N == torch.arange(len(magnitudes), device=g_mO.device)[:, None]
        precise = magnitudes[0].norm_O.dtype
        sums_EO = mine_EN.to(precise) @ (g_mO * z_mO).to(precise)
        for sum_O, magnitude in zip(sums_EO, magnitudes, strict=True):
            magnitude.parameter.accumulate(sum_O / magnitude.norm_O)
        self.scale(g_mO, magnitudes, out=g_mO)

    def _product(self, low_NR: Tensor, w_ERO: Tensor) -> Tensor:
        if has_kernel(low_NR, w_ERO):
            return grouped_mm(low_NR, w_ERO, offs=self._ends_E)
        return self._wide(low_NR) @ w_ERO.flatten(0, 1)

    def _wide(self, low_NR: Tensor) -> Tensor:
        """Each place's R in the columns of its expert: [N, X]."""
        num_places, rank = low_NR.shape
        zeros_NER = low_NR.new_zeros(num_places, len(self.loads_E), rank)
        return zeros_NER.scatter_(1, self._columns(rank), low_NR[:, None]).flatten(1)

    def _columns(self, rank: int) -> Tensor:
        return self.expert_N[:, None, None].expand(-1, 1, rank)

    @cached_property
    def _ends_E(self) -> Tensor:
        return self.loads_E.cumsum(0, dtype=torch.int32)

    @cached_property
    def _are_empty_E11(self) -> Tensor:
        """torch's kernel leaves a sum over no places unwritten."""
        return self.loads_E[:, None, None] == 0


def has_kernel(x: Tensor, w_ERO: Tensor) -> bool:
    """Whether torch multiplies groups, and on the device alone: without a kernel it would copy their sizes to the host.

    On a GPU there is one for bfloat16 on Hopper and Blackwell (9 and 10). Matrices must lie at whole 16 bytes.
    """
    aligned = all(width % 8 == 0 for width in (*w_ERO.shape[1:], w_ERO.stride(0))) and w_ERO.data_ptr() % 16 == 0
    return aligned and kernel_for(x.dtype, x.device)


def kernel_for(dtype: torch.dtype, device: torch.device) -> bool:
    if device.type == "cpu":  # where it takes no float64
        return dtype in (torch.bfloat16, torch.float32)
    return dtype is torch.bfloat16 and capability(device) in (9, 10)
