"""MixLoRA's feed-forward as the paper has it, by plain autograd: what our engine is measured against.

Each expert is a loop's turn. Router, dropout masks, LoRA of attention, packing, head and optimizer are the engine's,
so that a difference in time or memory is the feed-forward's alone.

Legend: T packed tokens, n a segment's tokens, N one expert's slots, D hidden, F feed-forward width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.base_model import BaseModel
from engine.feed_forward import PackedFeedForward
from engine.lora import LoraLinear
from engine.router import route
from engine.segments import Segment


class LoopedExperts(nn.Module):
    """Replaces the feed-forward of a layer for segments whose experts have a LoRA beside gate, up and down each.

    Without `shares_projections` an expert runs W1, W3 and W2 over its own tokens (paper eq. 5 and 6). With it W1x and
    W3x are computed once and sliced, and only W2 runs for each slot (§3.3 and Algorithm 1).
    """

    def __init__(self, packed: PackedFeedForward, *, shares_projections: bool):
        super().__init__()
        self.gate, self.up, self.down = packed.gate, packed.up, packed.down
        self.activation = packed.activation
        self.pass_ = packed.pass_
        self.layer = packed.layer
        self.shares_projections = shares_projections

    def forward(self, x: Tensor) -> Tensor:
        """[1, T, D] -> [1, T, D]."""
        x_TD = x[0]
        gate_T, up_T = x_TD, x_TD  # what an expert takes its rows of: W1x and W3x, or x itself
        if self.shares_projections:
            gate_T, up_T = self.gate.frozen(x_TD), self.up.frozen(x_TD)
        parts = []
        for start, segment, x_nD in self.pass_.batch.split(x_TD):
            rows = slice(start, start + len(x_nD))
            parts.append(x_nD if segment is None else self._mixture(segment, x_nD, gate_T[rows], up_T[rows]))
        return torch.cat(parts)[None]

    def _mixture(self, segment: Segment, x_nD: Tensor, gate_n: Tensor, up_n: Tensor) -> Tensor:
        """Σ_k r_k E_k(x); the padding of an expert's slots has weight 0."""
        assert segment.weights is not None
        config = segment.weights.config
        assert config.top_k is not None
        assert config.router_aux_loss_coef is not None
        routing, balance_J = route(x_nD, segment.parameter(self.layer, "router", "weight").leaf(), config.top_k)
        segment.aux_losses[self.layer] = config.router_aux_loss_coef * balance_J
        dropped_nD = segment.drop(x_nD, self.layer, self.gate.input_name).x
        y_nD = torch.zeros_like(x_nD)
        for expert, places in routing.whole.groups.shares:
            tokens_N, weights_N = routing.token_N[places], routing.weights_N[places]
            gate_NF, up_NF = gate_n[tokens_N], up_n[tokens_N]
            if not self.shares_projections:
                gate_NF, up_NF = self.gate.frozen(gate_NF), self.up.frozen(up_NF)
            dropped_ND = dropped_nD[tokens_N]
            gate_NF = gate_NF + self._lora(segment, self.gate, expert, dropped_ND)
            up_NF = up_NF + self._lora(segment, self.up, expert, dropped_ND)
            h_NF = self.activation(gate_NF) * up_NF
            dropped_NF = segment.drop(h_NF, self.layer, f"{self.down.input_name}.{expert}").x
            y_ND = self.down.frozen(h_NF) + self._lora(segment, self.down, expert, dropped_NF)
            y_nD.index_add_(0, tokens_N, y_ND * weights_N[:, None].to(y_ND.dtype))
        return y_nD

    def _lora(self, segment: Segment, linear: LoraLinear, expert: int, x_N: Tensor) -> Tensor:
        """s·xA'B; the scaling makes up for dropout too."""
        a, b = (
            segment.parameter(self.layer, linear.module, matrix).parts[expert].leaf().to(x_N.dtype) for matrix in "AB"
        )
        return segment.scaling * (F.linear(x_N, a) @ b)


@contextmanager
def feed_forwards(base: BaseModel, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Puts other feed-forwards in the base's layers, one each, and the engine's back afterwards."""
    layers = base.model.model.layers
    engines = [layer.mlp for layer in layers]
    _place(layers, modules)
    try:
        yield
    finally:
        _place(layers, engines)


def looped(base: BaseModel, *, shares_projections: bool) -> list[LoopedExperts]:
    """A baseline for each layer, on the base's own frozen weights."""
    return [LoopedExperts(layer.mlp, shares_projections=shares_projections) for layer in base.model.model.layers]


def _place(layers: nn.ModuleList, modules: Sequence[nn.Module]) -> None:
    for layer, module in zip(layers, modules, strict=True):
        layer.mlp = module
