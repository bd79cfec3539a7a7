"""MixLoRA's router and its auxiliary loss (paper §3.2, eq. 7 to 9).

Legend: n a segment's tokens, D hidden, E experts, K active experts, N = n·K slots and their padding, m those of a
block.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import device, fused, places
from engine.adapter import Parameter
from engine.grouped import Groups, Slices, Together
from engine.rows import Rows
from engine.segments import ROW_MULTIPLE

BLOCK_ROWS = 256
"""Places of a block where there are threads to take them, unless one expert alone has more."""


class Block(NamedTuple):
    """Neighbouring experts' places, which go through the feed-forward together."""

    number: int
    rows: slice
    groups: Groups


@dataclass(frozen=True)
class Routing:
    """Which expert takes which token. A slot is one (token, active expert); places are sorted by expert.

    On a CPU each expert's places are padded to a multiple, since it compiles its bfloat16 kernel anew for each
    number of rows (0.7 ms, 15 times a small matmul). In padding all that has rank R is 0, so it adds 0 to gradients.
    """

    weights_nK: Tensor  # renormalized to sum 1
    expert_nK: Tensor  # slot -> expert
    place_nK: Tensor  # slot -> place
    slot_N: Tensor  # place -> slot
    blocks: list[Block]  # every place is in one
    whole: Block  # all places as one block
    loads_E: Tensor  # slots of each expert

    @cached_property
    def token_N(self) -> Tensor:
        """place -> token."""
        return self.slot_N // self.place_nK.shape[1]

    def split(self, x_N: Tensor) -> Sequence[Tensor]:
        """The rows of each block, by its number."""
        return x_N.split([block.rows.stop - block.rows.start for block in self.blocks])

    @cached_property
    def tokens(self) -> Sequence[Tensor]:
        """Of each block: place -> token."""
        return self.split(self.token_N)

    @cached_property
    def weights(self) -> Sequence[Tensor]:
        """Of each block: r by place."""
        return self.split(self.weights_N)

    def collect(self, x_ND: Tensor, out: Tensor | None = None) -> Tensor:
        """Σ_k x_k for each token, [N, D] -> [n, D]: the backward of giving each place its token's row."""
        out = torch.index_select(x_ND, 0, self.place_nK[:, 0], out=out)
        for place_n in self.place_nK.unbind(1)[1:]:
            out += x_ND.index_select(0, place_n)
        return out

    def combine(self, x_ND: Tensor, out: Tensor) -> Tensor:
        """Σ_k r_k x_k for each token: [N, D] -> [n, D].

        As x_1 + Σ_k>1 r_k (x_k - x_1), since Σ r_k = 1: weights rounded to bfloat16 would sum to something else.
        """
        first_nD = torch.index_select(x_ND, 0, self.place_nK[:, 0], out=out)
        rest = [x_ND.index_select(0, place_n).sub_(first_nD) for place_n in self.place_nK.unbind(1)[1:]]
        for k, difference_nD in enumerate(rest, start=1):
            first_nD.addcmul_(difference_nD, self.weights_nK[:, k : k + 1].to(x_ND.dtype))
        return first_nD

    @staticmethod
    def combine_backward(g_nD: Tensor, x_mD: Tensor, token_m: Tensor, r_m: Tensor) -> tuple[Tensor, Tensor]:
        """Of places of these tokens and weights: (gradient at x [m, D], gradient at r [m])."""
        g_mD = g_nD.index_select(0, token_m)
        g_r_m = (g_mD * x_mD).sum(-1, dtype=r_m.dtype)
        return g_mD.mul_(r_m[:, None].to(g_mD.dtype)), g_r_m

    @cached_property
    def weights_N(self) -> Tensor:
        """r by place, 0 in the padding: no gradient comes from there."""
        zeros_N = self.weights_nK.new_zeros(len(self.token_N))
        return zeros_N.index_copy_(0, self.place_nK.flatten(), self.weights_nK.flatten())

    def narrow(self, x_nD: Tensor, a: Parameter) -> Tensor:
        """A x of each place: [N, R], for A [E, R, D]."""
        raise NotImplementedError

    def narrow_backward(self, g_low_NR: Tensor, x_nD: Tensor, a: Parameter, g_x_nD: Tensor) -> None:
        """Adds to the gradients of A and, in place, at x."""
        raise NotImplementedError

    def gather(self, low_NR: Tensor) -> Tensor:
        """r_k low_k of each place, as `widen_` takes it."""
        raise NotImplementedError

    def gather_backward(self, g_gathered: Tensor, low_NR: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients at low [N, R] and at r [n, K]."""
        raise NotImplementedError

    def widen_(self, y_nD: Tensor, gathered: Tensor, b: Parameter) -> None:
        """y += Σ_k r_k B low_k, in place."""
        raise NotImplementedError

    def widen_backward(self, g_nD: Tensor, gathered: Tensor, b: Parameter) -> Tensor:
        """Adds to the gradient of B; returns that of what was gathered."""
        raise NotImplementedError


class CellRouting(Routing):
    """On a CPU: A and B of all experts are one matmul over all tokens; a token has a cell of R columns for each expert.

    The cells of experts that a token does not have are multiplied too, which costs less than a matmul for each expert.
    So it goes for M modules at once: A [M, E, R, D] narrows x to [M, N, R].
    """

    def collect(self, x_ND: Tensor, out: Tensor | None = None) -> Tensor:
        return self._sum(x_ND, self._ones_nK, out)

    def combine(self, x_ND: Tensor, out: Tensor) -> Tensor:
        return self._sum(x_ND, self.weights_nK, out)

    def _sum(self, x_ND: Tensor, weights_nK: Tensor, out: Tensor | None) -> Tensor:
        out = x_ND.new_empty(len(weights_nK), x_ND.shape[1]) if out is None else out
        fused.combine(x_ND, self.place_nK, weights_nK, out)
        return out

    def narrow(self, x_nD: Tensor, a: Parameter) -> Tensor:
        low_MNR = self._from_cells(F.linear(x_nD, a.value.flatten(0, -2)), self._ones_nK, a.value.shape[-2])
        return low_MNR.view(*a.value.shape[:-3], *low_MNR.shape[1:])

    def narrow_backward(self, g_low_NR: Tensor, x_nD: Tensor, a: Parameter, g_x_nD: Tensor) -> None:
        dense_nX = self._to_cells(g_low_NR, self._ones_nK)
        a.accumulate(dense_nX.t() @ x_nD)
        g_x_nD.addmm_(dense_nX, a.value.flatten(0, -2))

    def gather(self, low_NR: Tensor) -> Tensor:
        """In the cells, with 0 for the experts that a token does not have: [n, X]."""
        return self._to_cells(low_NR, self.weights_nK)

    def gather_backward(self, g_gathered: Tensor, low_NR: Tensor) -> tuple[Tensor, Tensor]:
        g_r_nK = torch.empty_like(self.weights_nK)
        places.dot(self._cells(g_gathered, low_NR.shape[1]), low_NR[None], self.place_nK, self.expert_nK, g_r_nK)
        return self._from_cells(g_gathered, self.weights_nK, low_NR.shape[1])[0], g_r_nK

    def widen_(self, y_nD: Tensor, gathered: Tensor, b: Parameter) -> None:
        y_nD.addmm_(gathered, b.value.flatten(0, 1))

    def widen_backward(self, g_nD: Tensor, gathered: Tensor, b: Parameter) -> Tensor:
        b.accumulate(gathered.t() @ g_nD)
        return g_nD @ b.value.flatten(0, 1).t()

    def _to_cells(self, low_NR: Tensor, factor_nK: Tensor) -> Tensor:
        """[(M,) N, R] to [n, M·E·R]."""
        low_MNR = low_NR.view(-1, *low_NR.shape[-2:])
        cells_nMER = low_NR.new_zeros(len(factor_nK), len(low_MNR), len(self.loads_E), low_NR.shape[-1])
        places.to_cells(low_MNR, self.place_nK, self.expert_nK, factor_nK, cells_nMER)
        return cells_nMER.flatten(1)

    def _from_cells(self, dense_nX: Tensor, factor_nK: Tensor, rank: int) -> Tensor:
        """[n, M·E·R] to [M, N, R], with 0 in the padding."""
        cells_nMER = self._cells(dense_nX, rank)
        low_MNR = dense_nX.new_zeros(cells_nMER.shape[1], len(self.slot_N), rank)
        places.from_cells(cells_nMER, self.place_nK, self.expert_nK, factor_nK, low_MNR)
        return low_MNR

    def _cells(self, dense_nX: Tensor, rank: int) -> Tensor:
        return dense_nX.view(len(dense_nX), -1, len(self.loads_E), rank)

    @cached_property
    def _ones_nK(self) -> Tensor:
        return torch.ones_like(self.weights_nK)


class PlaceRouting(Routing):
    """On a GPU: A and B work on places, so that no expert's rows touch another's (`engine.rows`)."""

    def narrow(self, x_nD: Tensor, a: Parameter) -> Tensor:
        return self.whole.groups.narrow(x_nD.index_select(0, self.token_N), a)

    def narrow_backward(self, g_low_NR: Tensor, x_nD: Tensor, a: Parameter, g_x_nD: Tensor) -> None:
        self.whole.groups.accumulate(a, g_low_NR, x_nD.index_select(0, self.token_N))
        g_x_ND = self.whole.groups.widen(g_low_NR, a)
        g_x_nD += self.collect(g_x_ND)

    def gather(self, low_NR: Tensor) -> Tensor:
        return low_NR * self._weights_N1(low_NR)

    def gather_backward(self, g_gathered: Tensor, low_NR: Tensor) -> tuple[Tensor, Tensor]:
        g_r_N = (g_gathered * low_NR).sum(-1, dtype=self.weights_N.dtype)
        return g_gathered * self._weights_N1(low_NR), g_r_N[self.place_nK]

    def widen_(self, y_nD: Tensor, gathered: Tensor, b: Parameter) -> None:
        y_nD += self.collect(self.whole.groups.widen(gathered, b))

    def widen_backward(self, g_nD: Tensor, gathered: Tensor, b: Parameter) -> Tensor:
        g_ND = g_nD.index_select(0, self.token_N)
        self.whole.groups.accumulate(b, gathered, g_ND)
        return self.whole.groups.narrow(g_ND, b)

    def _weights_N1(self, like: Tensor) -> Tensor:
        return self.weights_N[:, None].to(like.dtype)


def route(x_nD: Tensor, router: Tensor, top_k: int, rows: Rows | None = None) -> tuple[Routing, Tensor]:
    """Softmax in float32, keep the top K, renormalize; `router`: [E, D], or of each microbatch of `rows` [J, E, D].

    Returns the routing, with the experts of all microbatches numbered through, and of each microbatch [J]
    E·Σ_e F_e·P_e with F_e = slots of e / tokens and P_e the mean probability: all K slots count, as in the authors'
    code, so a balanced router gives K (the paper's eq. 9 writes argmax).
    """
    precise = torch.promote_types(x_nD.dtype, torch.float32)
    num_tokens, num_experts = len(x_nD), router.shape[-2]
    if rows is None:
        probability_nE = F.linear(x_nD.to(precise), router.to(precise)).softmax(-1)
        mean_JE = probability_nE.mean(0, keepdim=True)
        top_nK, expert_nK = probability_nE.topk(top_k, dim=-1)
    else:
        probability_JME = torch.bmm(rows.padded(x_nD).to(precise), router.to(precise).mT).softmax(-1)
        mean_JE = rows.mean(probability_JME)
        top_nK, expert_nK = rows.unpadded(probability_JME).topk(top_k, dim=-1)
        expert_nK = expert_nK + rows.microbatch_n[:, None] * num_experts
    place, kind = (_place, CellRouting) if device.may_look(x_nD.device) else (_place_unseen, PlaceRouting)
    placed = place(expert_nK, mean_JE.numel())
    routing = kind(top_nK / top_nK.sum(-1, keepdim=True), expert_nK, *placed)
    counts_J1 = num_tokens if rows is None else rows.counts_J[:, None]
    balance_J = num_experts * (placed.loads_E.view_as(mean_JE).to(precise) / counts_J1 * mean_JE).sum(-1)
    return routing, balance_J


class _Placed(NamedTuple):
    """As `Routing` has it: slots sorted by expert, those of one by token."""

    place_nK: Tensor
    slot_N: Tensor
    blocks: list[Block]
    whole: Block
    loads_E: Tensor


def _place(expert_nK: Tensor, num_experts: int) -> _Placed:
    """Each expert's padded, in blocks."""
    loads_E = torch.bincount(expert_nK.flatten(), minlength=num_experts)
    sizes_E = (loads_E + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
    sizes = sizes_E.tolist()
    place_nK, slot_N = torch.empty_like(expert_nK), expert_nK.new_zeros(sum(sizes))
    places.sort(expert_nK, sizes_E.cumsum(0) - sizes_E, place_nK, slot_N)
    whole = Block(0, slice(0, len(slot_N)), Slices(0, sizes))
    blocks = [whole] if torch.get_num_threads() == 1 else list(_blocks(sizes))
    return _Placed(place_nK, slot_N, blocks, whole, loads_E)


def _place_unseen(expert_nK: Tensor, num_experts: int) -> _Placed:
    """One after the other, in one block: what is read on the host does not depend on how many an expert has."""
    slot_expert = expert_nK.flatten()
    order = slot_expert.argsort(stable=True)
    experts_N, places_N = slot_expert[order], torch.arange(len(order), device=order.device)
    loads_E = (experts_N == torch.arange(num_experts, device=order.device)[:, None]).sum(1)
    whole = Block(0, slice(0, len(order)), Together(experts_N, loads_E))
    place_nK = torch.empty_like(order).index_copy_(0, order, places_N).view_as(expert_nK)
    return _Placed(place_nK, order, [whole], whole, loads_E)


def _blocks(sizes: Sequence[int]) -> Iterator[Block]:
    """Neighbouring experts together, as long as they have no more than `BLOCK_ROWS` places."""
    number = first = start = rows = 0
    for last, size in enumerate([*sizes, BLOCK_ROWS]):
        if rows and rows + size > BLOCK_ROWS:
            yield Block(number, slice(start, start + rows), Slices(first, sizes[first:last]))
            number, first, start, rows = number + 1, last, start + rows, 0
        rows += size
