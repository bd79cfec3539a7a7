"""The gated feed-forward block, packed: MixLoRA (paper eq. 5 and 6, Algorithm 1), LoRA, or the base alone.

The frozen W1, W3 and W2 run once over the pack, whatever the number of jobs, experts and active experts. The
paper shares W1x and W3x and says that W2 cannot be shared; it can, being linear and common to the experts, whose
weights sum to 1 (DESIGN §3): Σ_k r_k(W2 h_k + s·B_k A_k d(h_k)) = W2(Σ_k r_k h_k) + Σ_k r_k·s·B_k A_k d(h_k).

Legend: T packed tokens, n a segment's tokens, N = n·K slots sorted by expert, D hidden, F feed-forward width.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.families import Family
from engine.lora import lora_delta
from engine.passes import Pass
from engine.router import Routing, route
from engine.segments import Segment


class PackedFeedForward(nn.Module):
    """Replaces a decoder layer's gated MLP."""

    def __init__(self, frozen: nn.Module, family: Family, pass_: Pass, layer: int):
        super().__init__()
        self.gate: nn.Linear = getattr(frozen, family.gate)
        self.up: nn.Linear = getattr(frozen, family.up)
        self.down: nn.Linear = getattr(frozen, family.down)
        self.activation: nn.Module = frozen.act_fn  # type: ignore[assignment]
        self.family = family
        self.pass_ = pass_
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """[1, T, D] -> [1, T, D]."""
        batch = self.pass_.batch
        gate_TF, up_TF = self.gate(x)[0], self.up(x)[0]
        hidden_parts, deltas = [], []
        for (segment, x_nD), gate_nF, up_nF in zip(
            batch.split(x[0]), gate_TF.split(batch.sizes), up_TF.split(batch.sizes), strict=True
        ):
            hidden_nF, delta_nD = self._segment(segment, x_nD, gate_nF, up_nF)
            hidden_parts.append(hidden_nF)
            deltas.append(delta_nD)
        y = self.down(torch.cat(hidden_parts))
        if any(delta is not None for delta in deltas):
            parts = zip(y.split(batch.sizes), deltas, strict=True)
            y = torch.cat([part if delta is None else part + delta for part, delta in parts])
        return y[None]

    def _segment(
        self, segment: Segment | None, x_nD: Tensor, gate_nF: Tensor, up_nF: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The segment's hidden rows [n, F] for the frozen W2, and what its adapter adds after it [n, D]."""
        if segment is None or not any(map(segment.targets, self.family.mlp)):
            return self.activation(gate_nF) * up_nF, None
        assert segment.adapter is not None
        config = segment.adapter.config
        routing = None
        if config.is_mixture:
            assert config.top_k is not None and config.router_aux_loss_coef is not None
            routing, balance = route(x_nD, segment.parameter(self.layer, "router", "weight"), config.top_k)
            segment.aux_losses.append(config.router_aux_loss_coef * balance)
            segment.expert_loads.append(routing.loads_E)
        if not torch.is_grad_enabled():
            return self._adapted(segment, routing, x_nD, gate_nF, up_nF)
        # Recomputed in the backward: kept are x, W1x, W3x and the routing, not the states of K experts.
        return checkpoint(
            self._adapted,
            segment,
            routing,
            x_nD,
            gate_nF,
            up_nF,
            use_reentrant=False,
            preserve_rng_state=False,
        )

    def _adapted(
        self, segment: Segment, routing: Routing | None, x_nD: Tensor, gate_nF: Tensor, up_nF: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The block with the segment's experts, or with its one LoRA when there is no routing."""
        dropped = segment.drop(x_nD, self.layer, "mlp_input")
        if routing is not None:
            dropped, gate_nF, up_nF = map(routing.dispatch, (dropped, gate_nF, up_nF))
        gate = self._add(segment, routing, self.family.gate, dropped, gate_nF)
        up = self._add(segment, routing, self.family.up, dropped, up_nF)
        hidden = self.activation(gate) * up
        delta = None
        if segment.targets(self.family.down):
            parts = [
                lora_delta(
                    segment.drop(rows, self.layer, f"down_input.{expert}"),
                    segment,
                    self.layer,
                    self.family.down,
                    expert,
                )
                for expert, rows in _by_expert(routing, hidden)
            ]
            delta = torch.cat(parts)
        if routing is None:
            return hidden, delta
        return routing.combine(hidden), None if delta is None else routing.combine(delta)

    def _add(
        self, segment: Segment, routing: Routing | None, module: str, dropped: Tensor, common: Tensor
    ) -> Tensor:
        """Each expert's LoRA of `module` added to the shared projection of its rows."""
        if not segment.targets(module):
            return common
        rows = zip(_by_expert(routing, dropped), _by_expert(routing, common), strict=True)
        return torch.cat(
            [y + lora_delta(x, segment, self.layer, module, expert) for (expert, x), (_, y) in rows]
        )


def _by_expert(routing: Routing | None, sorted_rows: Tensor) -> list[tuple[int | None, Tensor]]:
    """(expert, its rows) of all experts that got a token; one entry (None, rows) without a routing."""
    if routing is None:
        return [(None, sorted_rows)]
    return [(expert, rows) for expert, rows in enumerate(sorted_rows.split(routing.counts)) if len(rows)]
