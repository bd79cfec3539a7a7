"""MixLoRA's router and its auxiliary loss (paper §3.2, eq. 7 to 9).

Legend: n a segment's tokens, D hidden, E experts, K active experts, N = n·K slots and their padding.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.segments import ROW_MULTIPLE


@dataclass(frozen=True)
class Routing:
    """Which expert takes which token. A slot is one (token, active expert); places are sorted by expert.

    Each expert's places are padded to a multiple, since a CPU compiles its bfloat16 kernel anew for each number
    of rows (0.7 ms, 15 times a small matmul). Padding computes a row that nothing reads.
    """

    weights_nK: Tensor  # renormalized to sum 1
    cell_nK: Tensor  # slot -> token · E + expert
    place_nK: Tensor  # slot -> place
    token_N: Tensor  # place -> token
    ranges: list[tuple[int, int, int]]  # (expert, first place, last place + 1) of each expert that got a token
    loads_E: Tensor  # slots of each expert

    def dispatch(self, x_nD: Tensor) -> Tensor:
        """Each token's row, once for each of its experts, sorted by expert: [n, D] -> [N, D]."""
        return x_nD.index_select(0, self.token_N)

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

    def combine_backward(self, g_nD: Tensor, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """(gradient at x [N, D], gradient at r by place [N])."""
        g_ND = self.dispatch(g_nD)
        g_r_N = (g_ND * x_ND).sum(-1, dtype=self.weights_nK.dtype)
        return g_ND.mul_(self.weights_N[:, None].to(g_ND.dtype)), g_r_N

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
    loads_E = torch.bincount(slot_expert, minlength=num_experts)
    sizes_E = (loads_E + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
    order = slot_expert.argsort(stable=True)  # slots by expert, within one by token
    padding_before_E = (sizes_E - loads_E).cumsum(0) - (sizes_E - loads_E)
    sizes = sizes_E.tolist()
    places = torch.arange(len(order), device=order.device) + padding_before_E[slot_expert[order]]
    starts = accumulate(sizes[:-1], initial=0)
    tokens_n1 = torch.arange(num_tokens, device=order.device)[:, None]
    routing = Routing(
        weights_nK=top_nK / top_nK.sum(-1, keepdim=True),
        cell_nK=tokens_n1 * num_experts + expert_nK,
        place_nK=torch.empty_like(order).index_copy_(0, order, places).view_as(expert_nK),
        token_N=order.new_zeros(sum(sizes)).index_copy_(0, places, order // top_k),
        ranges=[(e, start, start + size) for e, (start, size) in enumerate(zip(starts, sizes, strict=True)) if size],
        loads_E=loads_E,
    )
    balance = num_experts * (loads_E.to(precise) / num_tokens * probability_nE.mean(0)).sum()
    return routing, balance
