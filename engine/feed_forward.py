"""The gated feed-forward block, packed: MixLoRA (paper eq. 5 and 6, Algorithm 1), LoRA, or the base alone.

The frozen W1, W3 and W2 run once over the pack, whatever the number of jobs, experts and active experts. The
paper shares W1x and W3x and says that W2 cannot be shared; it can, being linear and common to the experts, whose
weights sum to 1 (docs/design.md §3): Σ_k r_k(W2 h_k + s·B_k A_k d(h_k)) = W2(Σ_k r_k h_k) + Σ_k r_k·s·B_k A_k d(h_k).
Only MixDoRA, whose experts scale the outputs of W2, needs W2 h_k for each slot.

Legend: T packed tokens, n a segment's tokens, N its slots sorted by expert, D hidden, F feed-forward width, X = E·R.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine import activation, fused
from engine.adapter import Parameter
from engine.experts import DownLora, ExpertLora, Experts, FusedExperts, InputGradients, SplitDown
from engine.families import Family
from engine.lanes import take_share
from engine.lora import LoraLinear
from engine.passes import Pass
from engine.router import Routing, route
from engine.segments import Segment


@dataclass(frozen=True)
class Part:
    """The rows `start` to `stop` of a pack: a segment's, or the padding at its end."""

    start: int
    stop: int
    segment: Segment | None
    experts: Experts | None  # None: they go through the block as it is

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


class PackedFeedForward(nn.Module):
    """Replaces a decoder layer's gated MLP. Its linear modules add the LoRA of segments without experts."""

    def __init__(self, frozen: nn.Module, family: Family, pass_: Pass, layer: int):
        super().__init__()
        self.gate, self.up, self.down = (
            LoraLinear(getattr(frozen, module), pass_, layer, module, family.input_of(module)) for module in family.mlp
        )
        self.activation: nn.Module = frozen.act_fn  # type: ignore[assignment]
        self.pass_ = pass_
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """[1, T, D] -> [1, T, D]."""
        take_share()
        parts = []
        x_TD = x.squeeze(0)
        for start, segment, x_nD in self.pass_.batch.split(x_TD):
            experts = self._experts(segment, x_nD) if segment is not None and segment.is_mixture else None
            parts.append(Part(start, start + len(x_nD), segment, experts))
        mixtures = [part.experts for part in parts if part.experts is not None]
        hidden_TF, *extras = _GatedUnit.apply(
            self.pass_.anchor,
            x_TD,
            self.gate.rows(x_TD),
            self.up.rows(x_TD),
            self.activation,
            parts,
            *(experts.routing.weights_nK for experts in mixtures),
        )
        y_TD = self.down.rows(hidden_TF)
        return self._down(y_TD, [part for part in parts if part.experts is not None], extras)[None]

    def _experts(self, segment: Segment, x_nD: Tensor) -> Experts:
        """Routes the segment's tokens."""
        assert segment.weights is not None
        config = segment.weights.config
        assert config.top_k is not None
        assert config.router_aux_loss_coef is not None
        router = segment.parameter(self.layer, "router", "weight").leaf()
        routing, balance_J = route(x_nD, router, config.top_k, segment.rows)
        segment.aux_losses[self.layer] = config.router_aux_loss_coef * balance_J
        segment.expert_loads[self.layer] = routing.loads_E.view(len(balance_J), -1)
        down = None
        if segment.has_experts(self.down.module) and not config.dora:
            a = segment.parameter(self.layer, self.down.module, "A")
            down = DownLora(a, segment, self.layer, self.down.input_name, routing)
        gate, up = (self._expert_lora(segment, linear, routing) for linear in (self.gate, self.up))
        input_ = segment.drop(x_nD.detach(), self.layer, self.gate.input_name)
        if gate and up and down and fused.takes(self.activation, x_nD):
            together = segment.narrowings(self.layer, self.gate.input_name, of_experts=True)
            names = self.gate.module, self.up.module
            narrowings = [([names.index(module) for module in modules], a) for modules, a in together]
            return FusedExperts(
                routing, self.activation, input_, gate, up, down, splits_down=False, narrowings=narrowings
            )
        splits_down = config.dora and segment.has_experts(self.down.module)
        return Experts(routing, self.activation, input_, gate, up, down, splits_down)

    def _expert_lora(self, segment: Segment, linear: LoraLinear, routing: Routing) -> ExpertLora | None:
        if not segment.has_experts(linear.module):
            return None
        a, b = (segment.parameter(self.layer, linear.module, matrix) for matrix in "AB")
        return ExpertLora(a, b, segment.scaling, routing, linear.magnitudes(segment), linear.frozen.bias)

    def _down(self, y_TD: Tensor, mixtures: Sequence[Part], extras: Sequence[Tensor]) -> Tensor:
        """What the mixtures' own down projections add to W2 of the hidden states, or put in its place."""
        shared, split = [], {}
        for part, extra in zip(mixtures, extras, strict=True):
            assert part.segment is not None
            assert part.experts is not None
            if part.experts.splits_down:
                split[part.start] = self._split_down(part.segment, part.experts, extra)
            elif part.experts.down is not None:
                b = part.segment.parameter(self.layer, self.down.module, "B")
                shared.append((part.rows, b, part.experts.routing, extra))
        if shared:
            y_TD = _AddDown.apply(self.pass_.anchor, y_TD, shared, *(extra for *_, extra in shared))
        if not split:
            return y_TD
        return torch.cat([split.get(start, y_nD) for start, _, y_nD in self.pass_.batch.split(y_TD)])

    def _split_down(self, segment: Segment, experts: Experts, h_NF: Tensor) -> Tensor:
        """MixDoRA: Σ_k r_k m_k/‖W2 + s·B_k A_k‖ ∘ (W2 h_k + s·B_k A_k d(h_k)), [n, D]."""
        a, b = (segment.parameter(self.layer, self.down.module, matrix) for matrix in "AB")
        frozen, down = self.down.frozen, DownLora(a, segment, self.layer, self.down.input_name, experts.routing)
        y_ND = SplitDown.apply(
            self.pass_.anchor, frozen(h_NF), h_NF, frozen.bias, down, b, self.down.magnitudes(segment)
        )
        return _Combine.apply(y_ND, experts.routing, experts.routing.weights_nK)


class _GatedUnit(torch.autograd.Function):
    """act(gate)·up by segments, since an activation over the pack may depend on who else is in it (§3).

    Returns the hidden states that go through the frozen W2 and one tensor for each mixture (`Experts.forward`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        x_TD: Tensor,
        gate_TF: Tensor,
        up_TF: Tensor,
        act: nn.Module,
        parts: Sequence[Part],
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        hidden_TF = torch.empty_like(gate_TF)
        extras = []
        for part in parts:
            gate_nF, up_nF, hidden_nF = (tensor[part.rows] for tensor in (gate_TF, up_TF, hidden_TF))
            if part.experts is None:
                activation.gated(act, gate_nF, up_nF, hidden_nF)
            else:
                extras.append(part.experts.forward(gate_nF, up_nF, hidden_nF))
        ctx.input_shape, ctx.activation, ctx.parts = x_TD.shape, act, parts
        ctx.save_for_backward(gate_TF, up_TF)
        ctx.set_materialize_grads(False)
        return hidden_TF, *extras

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        take_share()
        g_hidden_TF, *g_extras = gradients
        gate_TF, up_TF = ctx.saved_tensors
        parts, ctx.parts = ctx.parts, None  # a pass lets go of what it kept while it goes back
        g_x_TD = g_hidden_TF.new_zeros(ctx.input_shape)
        g_gate_TF, g_up_TF = torch.empty_like(g_hidden_TF), torch.empty_like(g_hidden_TF)
        g_weights: list[Tensor | None] = []
        for part in parts:
            g_hidden_nF, g_gate_nF, g_up_nF = (tensor[part.rows] for tensor in (g_hidden_TF, g_gate_TF, g_up_TF))
            if part.experts is not None:
                out = InputGradients(g_x_TD[part.rows], g_gate_nF, g_up_nF)
                g_weights.append(part.experts.backward(g_hidden_nF, g_extras[len(g_weights)], out))
                continue
            gate_nF, up_nF = gate_TF[part.rows], up_TF[part.rows]
            activation.gated_backward(ctx.activation, gate_nF, up_nF, g_hidden_nF, g_gate_nF, g_up_nF)
        return None, g_x_TD, g_gate_TF, g_up_TF, None, None, *g_weights


class _AddDown(torch.autograd.Function):
    """y[rows] += what `DownLora.output` gave, through the experts' B, in place."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        y_TD: Tensor,
        parts: Sequence[tuple[slice, Parameter, Routing, Tensor]],
        *lows: Tensor,
    ) -> Tensor:
        for rows, b, routing, low in parts:
            routing.widen_(y_TD[rows], low, b)
        ctx.parts = parts
        ctx.mark_dirty(y_TD)
        return y_TD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g_TD,) = gradients
        g_lows = []
        for rows, b, routing, low in ctx.parts:
            g_lows.append(routing.widen_backward(g_TD[rows], low, b))
        return None, g_TD, None, *g_lows


class _Combine(torch.autograd.Function):
    """`Routing.combine` with its backward."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, routing: Routing, weights_nK: Tensor) -> Tensor:
        ctx.x_ND, ctx.routing = x_ND, routing
        return routing.combine(x_ND, x_ND.new_empty(len(weights_nK), x_ND.shape[1]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        g_x_ND, g_r_N = ctx.routing.combine_backward(gradients[0], ctx.x_ND, ctx.routing.token_N, ctx.routing.weights_N)
        return g_x_ND, None, g_r_N[ctx.routing.place_nK]
