"""MixLoRA's router and its auxiliary loss (paper §3.2, eq. 7 to 9).

Legend: n a segment's tokens, D hidden, E experts, K active experts, N = n·K slots.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.segments import ROW_MULTIPLE


@dataclass(frozen=True)
class Routing:
    """Which expert takes which token. A slot is one (token, active expert); places are sorted by expert.

    Each expert's places are padded to a multiple, since a CPU compiles its bfloat16 kernel anew for each number
    of rows (0.7 ms, 15 times a small matmul). Padding computes a row that `combine` never reads.
    """

    weights_nK: Tensor  # renormalized to sum 1
    place_nK: Tensor  # slot -> place
    token_N: Tensor  # place -> token
    sizes: list[int]  # places of each expert, E numbers
    loads_E: Tensor  # slots of each expert

    def dispatch(self, x_nD: Tensor) -> Tensor:
        """Each token's row, once for each of its experts, sorted by expert: [n, D] -> [N, D]."""
        return _Dispatch.apply(x_nD, self.token_N, self.place_nK)

    def combine(self, x_ND: Tensor) -> Tensor:
        """Σ_k r_k x_k for each token: [N, D] -> [n, D]."""
        return _Combine.apply(x_ND, self.weights_nK.to(x_ND.dtype), self.token_N, self.place_nK)

    def by_expert(self, x_ND: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """(expert, first place, its rows) of every expert that got a token."""
        starts = accumulate(self.sizes[:-1], initial=0)
        for expert, (start, rows) in enumerate(zip(starts, x_ND.split(self.sizes), strict=True)):
            if len(rows):
                yield expert, start, rows


def route(x_nD: Tensor, router_ED: Tensor, top_k: int) -> tuple[Routing, Tensor]:
    """Softmax in float32, keep the top K, renormalize.

    Returns the routing and E·Σ_e F_e·P_e with F_e = slots of e / tokens and P_e the mean probability: all K
    slots count, as in the authors' code, so a balanced router gives K (the paper's eq. 9 writes argmax).
    """
    precise = torch.promote_types(x_nD.dtype, torch.float32)
    num_experts = router_ED.shape[0]
    probability_nE = F.linear(x_nD.to(precise), router_ED.to(precise)).softmax(-1)
    top_nK, expert_nK = probability_nE.topk(top_k, dim=-1)
    slot_expert = expert_nK.flatten()
    loads_E = torch.bincount(slot_expert, minlength=num_experts)
    sizes_E = (loads_E + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
    order = slot_expert.argsort(stable=True)  # slots by expert, within one by token
    padding_before_E = (sizes_E - loads_E).cumsum(0) - (sizes_E - loads_E)
    sizes = sizes_E.tolist()
    places = torch.arange(len(order), device=order.device) + padding_before_E[slot_expert[order]]
    routing = Routing(
        weights_nK=top_nK / top_nK.sum(-1, keepdim=True),
        place_nK=torch.empty_like(order).index_copy_(0, order, places).view_as(expert_nK),
        token_N=order.new_zeros(sum(sizes)).index_copy_(0, places, order // top_k),
        sizes=sizes,
        loads_E=loads_E,
    )
    balance = num_experts * (loads_E.to(precise) / len(x_nD) * probability_nE.mean(0)).sum()
    return routing, balance


class _Dispatch(torch.autograd.Function):
    """y[i] = x[token[i]]. Its inverse is known, so the gradient is gathered too, with nothing zero-filled."""

    @staticmethod
    def forward(ctx: Any, x_nD: Tensor, token_N: Tensor, place_nK: Tensor) -> Tensor:
        ctx.save_for_backward(place_nK)
        return x_nD.index_select(0, token_N)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (place_nK,) = ctx.saved_tensors
        total = gradients[0].index_select(0, place_nK[:, 0])
        for place_n in place_nK.unbind(1)[1:]:
            total += gradients[0].index_select(0, place_n)
        return total, None, None


class _Combine(torch.autograd.Function):
    """y[t] = Σ_k r[t, k]·x[place[t, k]], without the [n, K, D] between."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weights_nK: Tensor, token_N: Tensor, place_nK: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, weights_nK, token_N, place_nK)
        total = x_ND.index_select(0, place_nK[:, 0]) * weights_nK[:, :1]
        for k in range(1, place_nK.shape[1]):
            total.addcmul_(x_ND.index_select(0, place_nK[:, k]), weights_nK[:, k : k + 1])
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_ND, weights_nK, token_N, place_nK = ctx.saved_tensors
        gradient_ND = gradients[0].index_select(0, token_N)
        gradient_nK = torch.linalg.vecdot(gradient_ND, x_ND)[place_nK]
        weights_N = weights_nK.new_zeros(len(token_N)).index_copy_(0, place_nK.flatten(), weights_nK.flatten())
        return gradient_ND.mul_(weights_N[:, None]), gradient_nK, None, None
