"""MixLoRA's router and its auxiliary loss (paper §3.2, eq. 7 to 9).

Legend: n a segment's tokens, D hidden, E experts, K active experts, N = n·K slots and their padding, m those of a
block.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.grouped import Groups, Share, Slices, Together
from engine.segments import ROW_MULTIPLE

BLOCK_ROWS = 256
"""Places of a block, unless one expert alone has more: what is computed of them stays in the processor's cache."""


class Block(NamedTuple):
    """Neighbouring experts' places, which go through the feed-forward together."""

    rows: slice
    groups: Groups


@dataclass(frozen=True)
class Routing:
    """Which expert takes which token. A slot is one (token, active expert); places are sorted by expert.

    On a CPU each expert's places are padded to a multiple, since it compiles its bfloat16 kernel anew for each
    number of rows (0.7 ms, 15 times a small matmul). Padding computes a row that nothing reads.
    """

    weights_nK: Tensor  # renormalized to sum 1
    cell_nK: Tensor  # slot -> token · E + expert
    place_nK: Tensor  # slot -> place
    token_N: Tensor  # place -> token
    blocks: list[Block]  # every place is in one
    whole: Block  # all places as one block
    loads_E: Tensor  # slots of each expert

    def dispatch(self, x_nD: Tensor, block: Block) -> Tensor:
        """The token's row of each place of a block: [n, D] -> [m, D]."""
        return x_nD.index_select(0, self.token_N[block.rows])

    def collect(self, x_ND: Tensor, out: Tensor) -> Tensor:
        """The backward of `dispatch`: Σ_k x_k for each token, [N, D] -> [n, D]."""
        torch.index_select(x_ND, 0, self.place_nK[:, 0], out=out)
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

    def combine_backward(self, g_nD: Tensor, x_mD: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """Of a block: (gradient at x [m, D], gradient at r [m])."""
        g_mD, r_m = self.dispatch(g_nD, block), self.weights_N[block.rows]
        g_r_m = (g_mD * x_mD).sum(-1, dtype=r_m.dtype)
        return g_mD.mul_(r_m[:, None].to(g_mD.dtype)), g_r_m

    @cached_property
    def weights_N(self) -> Tensor:
        """r by place, 0 in the padding: no gradient comes from there."""
        zeros_N = self.weights_nK.new_zeros(len(self.token_N))
        return zeros_N.index_copy_(0, self.place_nK.flatten(), self.weights_nK.flatten())

    def from_cells(self, dense_nX: Tensor) -> Tensor:
        """Each slot's own R of a token's [n, E·R], by place: [N, R]."""
        num_cells = len(dense_nX) * len(self.loads_E)
        return dense_nX.view(num_cells, -1).index_select(0, self._cell_N)

    @cached_property
    def _cell_N(self) -> Tensor:
        """place -> cell; the padding has any."""
        zeros_N = self.cell_nK.new_zeros(len(self.token_N))
        return zeros_N.index_copy_(0, self.place_nK.flatten(), self.cell_nK.flatten())

    def to_cells(self, x_NR: Tensor) -> Tensor:
        """The inverse of `from_cells`, with 0 for the experts that a token does not have: [n, E·R]."""
        num_tokens, num_experts, rank = len(self.cell_nK), len(self.loads_E), x_NR.shape[1]
        slots = x_NR.index_select(0, self.place_nK.flatten())
        dense = x_NR.new_zeros(num_tokens * num_experts, rank).index_copy_(0, self.cell_nK.flatten(), slots)
        return dense.view(num_tokens, num_experts * rank)


def route(x_nD: Tensor, router_ED: Tensor, top_k: int) -> tuple[Routing, Tensor]:
    """Softmax in float32, keep the top K, renormalize.

    Returns the routing and E·Σ_e F_e·P_e with F_e = slots of e / tokens and P_e the mean probability: all K
    slots count, as in the authors' code, so a balanced router gives K (the paper's eq. 9 writes argmax).
    """
    precise = torch.promote_types(x_nD.dtype, torch.float32)
    num_tokens, num_experts = len(x_nD), len(router_ED)
    probability_nE = F.linear(x_nD.to(precise), router_ED.to(precise)).softmax(-1)
    top_nK, expert_nK = probability_nE.topk(top_k, dim=-1)
    slot_expert = expert_nK.flatten()
    order = slot_expert.argsort(stable=True)  # slots by expert, within one by token
    place = _place if may_look(x_nD.device) else _place_unseen
    places, blocks, whole, loads_E = place(slot_expert[order], num_experts, num_tokens)
    tokens_n1 = torch.arange(num_tokens, device=order.device)[:, None]
    routing = Routing(
        weights_nK=top_nK / top_nK.sum(-1, keepdim=True),
        cell_nK=tokens_n1 * num_experts + expert_nK,
        place_nK=torch.empty_like(order).index_copy_(0, order, places).view_as(expert_nK),
        token_N=order.new_zeros(whole.rows.stop).index_copy_(0, places, order // top_k),
        blocks=blocks,
        whole=whole,
        loads_E=loads_E,
    )
    balance = num_experts * (loads_E.to(precise) / num_tokens * probability_nE.mean(0)).sum()
    return routing, balance


def may_look(device: torch.device) -> bool:
    """Whether to read a value of a tensor there costs no wait."""
    return device.type == "cpu"


class _Places(NamedTuple):
    """Where slots, sorted by expert, lie."""

    places: Tensor  # [n·K]
    blocks: list[Block]
    whole: Block
    loads_E: Tensor


def _place(experts: Tensor, num_experts: int, num_tokens: int) -> _Places:
    """Each expert's padded, in blocks; `experts`: of each slot, sorted."""
    loads_E = torch.bincount(experts, minlength=num_experts)
    sizes_E = (loads_E + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
    padding_before_E = (sizes_E - loads_E).cumsum(0) - (sizes_E - loads_E)
    places = torch.arange(len(experts), device=experts.device) + padding_before_E[experts]
    sizes = sizes_E.tolist()
    ends = list(accumulate(sizes))
    shares = [Share(e, slice(end - size, end)) for e, (size, end) in enumerate(zip(sizes, ends, strict=True)) if size]
    return _Places(places, list(_blocks(sizes)), Block(slice(0, ends[-1]), Slices(shares)), loads_E)


def _place_unseen(experts: Tensor, num_experts: int, num_tokens: int) -> _Places:
    """One after the other, in one block: what is read on the host does not depend on how many an expert has."""
    loads_E = (experts == torch.arange(num_experts, device=experts.device)[:, None]).sum(1)
    whole = Block(slice(0, len(experts)), Together(experts, loads_E, num_tokens))
    return _Places(torch.arange(len(experts), device=experts.device), [whole], whole, loads_E)


def _blocks(sizes: Sequence[int]) -> Iterator[Block]:
    """Neighbouring experts together, as long as they have no more than `BLOCK_ROWS` places."""
    shares: list[Share] = []
    start = rows = 0
    for expert, size in enumerate(sizes):
        if shares and rows + size > BLOCK_ROWS:
            yield Block(slice(start, start + rows), Slices(shares))
            start, rows, shares = start + rows, 0, []
        if size:
            shares.append(Share(expert, slice(rows, rows + size)))
            rows += size
    if shares:
        yield Block(slice(start, start + rows), Slices(shares))
