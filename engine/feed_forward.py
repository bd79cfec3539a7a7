"""The gated feed-forward block, packed: MixLoRA (paper eq. 5 and 6, Algorithm 1), LoRA, or the base alone.

The frozen W1, W3 and W2 run once over the pack, whatever the number of jobs, experts and active experts. The
paper shares W1x and W3x and says that W2 cannot be shared; it can, being linear and common to the experts, whose
weights sum to 1 (docs/design.md §3): Σ_k r_k(W2 h_k + s·B_k A_k d(h_k)) = W2(Σ_k r_k h_k) + Σ_k r_k·s·B_k A_k d(h_k).

Legend: T packed tokens, n a segment's tokens, N = n·K slots sorted by expert, D hidden, F feed-forward width.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.families import Family
from engine.lora import Group, LoraLinear, add_lora
from engine.passes import Pass
from engine.router import Routing, route
from engine.segments import Segment


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
        batch = self.pass_.batch
        gates, ups = self.gate(x)[0].split(batch.sizes), self.up(x)[0].split(batch.sizes)
        hidden_parts, deltas = [], []
        for (_, segment, x_nD), gate_nF, up_nF in zip(batch.split(x[0]), gates, ups, strict=True):
            if segment is not None and segment.adapter is not None and segment.adapter.config.is_mixture:
                hidden_nF, delta_nD = self._mixture(segment, x_nD, gate_nF, up_nF)
            else:
                hidden_nF, delta_nD = self.activation(gate_nF) * up_nF, None
            hidden_parts.append(hidden_nF)
            deltas.append(delta_nD)
        y = self.down(torch.cat(hidden_parts)[None])
        if all(delta is None for delta in deltas):
            return y
        parts = zip(y[0].split(batch.sizes), deltas, strict=True)
        return torch.cat([part if delta is None else part + delta for part, delta in parts])[None]

    def _mixture(self, segment: Segment, x_nD: Tensor, gate_nF: Tensor, up_nF: Tensor) -> tuple[Tensor, Tensor | None]:
        """The segment's Σ_k r_k h_k [n, F] for the frozen W2, and what its experts add after it [n, D]."""
        assert segment.adapter is not None
        config = segment.adapter.config
        assert config.top_k is not None
        assert config.router_aux_loss_coef is not None
        routing, balance = route(x_nD, segment.parameter(self.layer, "router", "weight"), config.top_k)
        segment.aux_losses.append(config.router_aux_loss_coef * balance)
        segment.expert_loads.append(routing.loads_E)
        if not torch.is_grad_enabled():
            return self._experts(segment, routing, x_nD, gate_nF, up_nF)
        # Recomputed in the backward: kept are x, W1x, W3x and the routing, not the states of K experts.
        return checkpoint(
            self._experts, segment, routing, x_nD, gate_nF, up_nF, use_reentrant=False, preserve_rng_state=False
        )

    def _experts(
        self, segment: Segment, routing: Routing, x_nD: Tensor, gate_nF: Tensor, up_nF: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        x_ND = routing.dispatch(segment.drop(x_nD, self.layer, self.gate.input_name))
        gate_NF = self._add(segment, self.gate.module, routing.by_expert(x_ND), routing.dispatch(gate_nF))
        up_NF = self._add(segment, self.up.module, routing.by_expert(x_ND), routing.dispatch(up_nF))
        hidden_NF = self.activation(gate_NF) * up_NF
        if not segment.has_experts(self.down.module):
            return routing.combine(hidden_NF), None
        dropped = (
            (expert, start, segment.drop(rows, self.layer, f"{self.down.input_name}.{expert}"))
            for expert, start, rows in routing.by_expert(hidden_NF)
        )
        delta_ND = self._add(segment, self.down.module, dropped, hidden_NF.new_zeros(len(x_ND), x_nD.shape[1]))
        return routing.combine(hidden_NF), routing.combine(delta_ND)

    def _add(self, segment: Segment, module: str, rows: Iterable[tuple[int, int, Tensor]], y: Tensor) -> Tensor:
        """Each expert's LoRA of `module` added to its rows of y; `rows` are (expert, first row, its input)."""
        if not segment.has_experts(module):
            return y
        return add_lora(y, [Group.of(start, x, segment, self.layer, module, expert) for expert, start, x in rows])
