"""The experts of one segment in one layer, forward and backward by hand (paper §3.2, eq. 5 and 6; Algorithm 1).

Expert e has its own LoRA beside the shared gate (W1), up (W3) and down (W2). A is applied to all tokens for all
experts at once, one matmul of E·R columns (where there are loops, of 2·E·R for gate and up), and so is the B of down:
both are cheaper than one for each expert. The B of gate and up and the A of down work on each expert's own rows, in
blocks of neighbouring experts: where a pass has several threads, each takes blocks; else there is one. Between the
matmuls a CPU has one loop (`FusedExperts`), all else takes torch's operations (`Experts`).
Kept for the backward are x, W1x, W3x, the routing and activations of rank R; the states are computed again.

Legend: n a segment's tokens, N their slots sorted by expert, m those of a block, D hidden, F feed-forward width,
R rank, E experts, X = E·R.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine import activation, fused
from engine.adapter import Parameter
from engine.dora import Magnitude
from engine.dropout import Dropped
from engine.lanes import on_all_threads
from engine.router import Block, Routing
from engine.segments import Segment


@dataclass
class ExpertLora:
    """The experts' LoRA beside gate or up: one input for all experts, one output for each slot."""

    a: Parameter  # [E, R, D]
    b: Parameter  # [E, R, F]
    scaling: float
    routing: Routing
    magnitudes: list[Magnitude]  # of each expert (MixDoRA), or none
    bias_F: Tensor | None  # of the frozen module; no magnitude scales it

    def project(self, x_nD: Tensor) -> None:
        """s·Ax, kept for `add_` and its backward."""
        self.low = self.routing.split(self.routing.narrow(x_nD, self.a).mul_(self.scaling))  # of each block

    def add_(self, y_mF: Tensor, block: Block) -> Tensor | None:
        """y += s·Ax B for a block's rows, in place; then the magnitudes. Returns what they scale, for the backward."""
        block.groups.add_(y_mF, self.low[block.number], self.b)
        if not self.magnitudes:
            return None
        z_mF = y_mF.clone() if self.bias_F is None else y_mF - self.bias_F
        block.groups.scale(z_mF, self.magnitudes, out=y_mF)
        if self.bias_F is not None:
            y_mF += self.bias_F
        return z_mF

    def widened(self, block: Block) -> Tensor:
        """s·Ax B of a block's rows alone [m, F]."""
        return block.groups.widen(self.low[block.number], self.b)

    def add_backward_(self, g_mF: Tensor, z_mF: Tensor | None, block: Block) -> Tensor:
        """`g_mF`, the gradient at what `add_` gave, becomes that at the frozen module's output.

        Returns the gradient at s·Ax.
        """
        if z_mF is not None:
            block.groups.scale_backward_(g_mF, z_mF, self.magnitudes)
        block.groups.accumulate(self.b, self.low[block.number], g_mF)
        return block.groups.narrow(g_mF, self.b)

    def project_backward(self, g_low_NR: Tensor, x_nD: Tensor, g_x_nD: Tensor) -> None:
        """Adds the gradient at x, from that at s·Ax of all places, which it scales in place."""
        self.routing.narrow_backward(g_low_NR.mul_(self.scaling), x_nD, self.a, g_x_nD)


@dataclass
class DownLora:
    """The experts' LoRA beside down, up to its A; B is applied after the frozen W2, for all experts at once."""

    a: Parameter  # [E, R, F]
    segment: Segment
    layer: int
    input_name: str
    routing: Routing

    def begin(self) -> None:
        """Before the first block."""
        self.drops: dict[int, Tensor | None] = {}  # number of a block -> the dropped elements of its h

    def draw(self, block: Block, like_mF: Tensor) -> Tensor | None:
        """The dropped elements of a block's h; each expert has a mask of its own."""
        dropout = self.segment.dropout
        if dropout is not None:
            rows = self.routing.slot_N[block.rows]
            self.drops[block.number] = dropout.of_experts(self.layer, self.input_name, like_mF, block.groups, rows)
        return self.drops.get(block.number)

    def project(self, dropped_mF: Tensor, block: Block) -> Tensor:
        """s·A dropout(h) of a block's rows."""
        return block.groups.narrow(dropped_mF, self.a).mul_(self.segment.scaling)

    def output(self, low_NR: Tensor) -> Tensor:
        """r·s·A dropout(h) of each slot, as B takes it (`Routing.gather`), from that without r, which is kept."""
        self.low_NR = low_NR
        return self.routing.gather(low_NR)

    def output_backward(self, g_gathered: Tensor) -> Tensor:
        """The gradient at the routing weights [n, K]."""
        g_low_NR, g_r_nK = self.routing.gather_backward(g_gathered, self.low_NR)
        self.g_low = self.routing.split(g_low_NR.mul_(self.segment.scaling))  # of each block
        return g_r_nK

    def widened(self, block: Block) -> Tensor:
        """The gradient at dropout(h) of a block's rows."""
        return block.groups.widen(self.g_low[block.number], self.a)

    def accumulate(self, dropped_mF: Tensor, block: Block) -> None:
        """A's gradient, of a block's rows."""
        block.groups.accumulate(self.a, self.g_low[block.number], dropped_mF)

    def project_backward(self, h_mF: Tensor, block: Block, g_low_mR: Tensor) -> Tensor:
        """The gradient at a block's h, which is used up, from its rows of `g_low`."""
        dropped = Dropped.of_(h_mF, self.drops.get(block.number))
        block.groups.accumulate(self.a, g_low_mR, dropped.x)
        return dropped.backward_(block.groups.widen(g_low_mR, self.a))


class SplitDown(torch.autograd.Function):
    """MixDoRA's down: y = m/‖W2 + s·BA‖ ∘ (W2 h + s·BA d(h)) of each place, in place of W2 h (with its bias) [N, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        y_ND: Tensor,
        h_NF: Tensor,
        bias_D: Tensor | None,
        down: DownLora,
        b: Parameter,
        magnitudes: list[Magnitude],
    ) -> Tensor:
        block = down.routing.whole
        down.begin()
        down.low_NR = down.project(Dropped.of(h_NF, down.draw(block, h_NF)).x, block)
        block.groups.add_(y_ND, down.low_NR, b)
        z_ND = y_ND.clone() if bias_D is None else y_ND - bias_D
        block.groups.scale(z_ND, magnitudes, out=y_ND)
        if bias_D is not None:
            y_ND += bias_D
        ctx.save_for_backward(h_NF)
        ctx.z_ND, ctx.down, ctx.b, ctx.magnitudes = z_ND, down, b, magnitudes
        ctx.mark_dirty(y_ND)
        return y_ND

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        g_ND, (h_NF,), down, block = gradients[0].clone(), ctx.saved_tensors, ctx.down, ctx.down.routing.whole
        block.groups.scale_backward_(g_ND, ctx.z_ND, ctx.magnitudes)
        g_low_NR = block.groups.narrow(g_ND, ctx.b).mul_(down.segment.scaling)
        block.groups.accumulate(ctx.b, down.low_NR, g_ND)
        return None, g_ND, down.project_backward(h_NF, block, g_low_NR), None, None, None, None


@dataclass(frozen=True)
class InputGradients:
    """Where a backward writes: a segment's rows of the gradients at x (0 before), W1x and W3x."""

    x_nD: Tensor
    gate_nF: Tensor
    up_nF: Tensor


class BlockGradients(NamedTuple):
    """What the backward of a block gives: the gradients at its slots' W1x and W3x, and at s·Ax of gate and up."""

    gate_mF: Tensor
    up_mF: Tensor
    low_mR: list[Tensor]  # of one without LoRA nothing


@dataclass
class Experts:
    """h_k = act(W1x + …)·(W3x + …) for each slot, and what the frozen W2 and the B of down take of it."""

    routing: Routing
    activation: nn.Module
    input: Dropped  # x after dropout
    gate: ExpertLora | None
    up: ExpertLora | None
    down: DownLora | None
    splits_down: bool

    def forward(self, gate_nF: Tensor, up_nF: Tensor, hidden_nF: Tensor) -> Tensor:
        """Writes Σ_k r_k h_k, which goes through W2; returns what goes through the B of down (`Routing.gather`).

        Where the experts have a W2 each (`splits_down`) 0 is written, and h [N, F] returned.
        """
        self.gate_nF, self.up_nF = gate_nF, up_nF
        for lora in (self.gate, self.up):
            if lora is not None:
                lora.project(self.input.x)
        if self.down is not None:
            self.down.begin()
        h_NF = gate_nF.new_empty(len(self.routing.slot_N), gate_nF.shape[1])
        h = self.routing.split(h_NF)
        low_mR = on_all_threads(lambda block: self._forward(block, h[block.number]), self.routing.blocks)
        if self.splits_down:
            hidden_nF.zero_()
            return h_NF
        self.routing.combine(h_NF, hidden_nF)
        return h_NF.new_empty(0) if self.down is None else self.down.output(_joined(low_mR))

    def backward(self, g_hidden_nF: Tensor, g_extra: Tensor | None, out: InputGradients) -> Tensor | None:
        """From the gradients of what `forward` wrote and returned; returns that of the routing weights [n, K]."""
        routing = self.routing
        g_r_N, g_r_nK = torch.zeros_like(routing.weights_N), None
        if self.down is not None:
            assert g_extra is not None
            g_r_nK = self.down.output_backward(g_extra)
        g_r = routing.split(g_r_N)
        g_h: Sequence[Tensor] = [g_hidden_nF] * len(g_r)
        if self.splits_down:
            assert g_extra is not None
            g_h = routing.split(g_extra)
        blocks = on_all_threads(
            lambda block: self._backward(block, g_h[block.number], g_r[block.number]), routing.blocks
        )
        for lora, g_low_mR in zip(
            (self.gate, self.up), zip(*(block.low_mR for block in blocks), strict=True), strict=True
        ):
            if lora is not None:
                lora.project_backward(_joined(g_low_mR), self.input.x, out.x_nD)
        self.input.backward_(out.x_nD)
        routing.collect(_joined([block.gate_mF for block in blocks]), out.gate_nF)
        routing.collect(_joined([block.up_mF for block in blocks]), out.up_nF)
        if self.splits_down:
            return None
        by_h_nK = g_r_N[routing.place_nK]
        return by_h_nK if g_r_nK is None else by_h_nK + g_r_nK

    def _forward(self, block: Block, h_mF: Tensor) -> Tensor:
        """Writes a block's h; returns what `DownLora.project` makes of it."""
        (gate_mF, _), (up_mF, _) = self._states(block)
        torch.mul(activation.forward(self.activation, gate_mF, out=gate_mF), up_mF, out=h_mF)
        if self.down is None:
            return h_mF.new_empty(0)
        return self.down.project(Dropped.of(h_mF, self.down.draw(block, h_mF)).x, block)

    def _backward(self, block: Block, g_hidden: Tensor, g_r_m: Tensor) -> BlockGradients:
        """Writes the gradient at r, by way of h, to `g_r_m`.

        `g_hidden` is the gradient at Σ_k r_k h_k [n, F], or at the block's h [m, F] where experts have a W2 each.
        """
        (gate_mF, gate_z_mF), (up_mF, up_z_mF) = self._states(block)
        a_mF = activation.forward(self.activation, gate_mF, out=torch.empty_like(gate_mF))
        if self.splits_down:
            g_h_mF = g_hidden
        else:
            h_mF, i = a_mF * up_mF, block.number
            g_h_mF, by_h_m = Routing.combine_backward(g_hidden, h_mF, self.routing.tokens[i], self.routing.weights[i])
            g_r_m.copy_(by_h_m)
            if self.down is not None:
                g_h_mF += self.down.project_backward(h_mF, block, self.down.g_low[i])
        g_up_mF, g_a_mF = a_mF * g_h_mF, up_mF.mul_(g_h_mF)
        g_gate_mF = activation.backward(self.activation, gate_mF, g_a_mF, out=a_mF)
        g_low_mR = [
            g_mF.new_empty(0) if lora is None else lora.add_backward_(g_mF, z_mF, block)
            for lora, g_mF, z_mF in ((self.gate, g_gate_mF, gate_z_mF), (self.up, g_up_mF, up_z_mF))
        ]
        return BlockGradients(g_gate_mF, g_up_mF, g_low_mR)

    def _states(self, block: Block) -> list[tuple[Tensor, Tensor | None]]:
        """Gate and up of a block's slots [m, F], with the experts' LoRA; each with what its magnitudes scale."""
        states = []
        for lora, frozen_nF in ((self.gate, self.gate_nF), (self.up, self.up_nF)):
            y_mF = frozen_nF.index_select(0, self.routing.tokens[block.number])
            z_mF = None if lora is None else lora.add_(y_mF, block)
            states.append((y_mF, z_mF))
        return states


@dataclass
class FusedExperts(Experts):
    """On a CPU, with LoRA on all three modules and no magnitudes: the same in loops of our own (`engine.fused`)."""

    gate: ExpertLora
    up: ExpertLora
    down: DownLora
    narrowings: Sequence[tuple[Sequence[int], Parameter]]  # which of gate and up, and their A together [M, E, R, D]

    def forward(self, gate_nF: Tensor, up_nF: Tensor, hidden_nF: Tensor) -> Tensor:
        self.gate_nF, self.up_nF, routing, down = gate_nF, up_nF, self.routing, self.down
        loras = self.gate, self.up
        for which, a in self.narrowings:
            low_MNR = routing.narrow(self.input.x, a).mul_(down.segment.scaling)
            for i, low_NR in zip(which, low_MNR, strict=True):
                loras[i].low = routing.split(low_NR)
        down.begin()
        gate_NF, up_NF = self._of_all_places(self.gate.widened), self._of_all_places(self.up.widened)
        drops = down.draw(routing.whole, gate_NF)
        fused.forward(gate_nF, up_nF, routing.place_nK, routing.weights_nK, gate_NF, up_NF, drops, hidden_nF)
        dropped = routing.split(gate_NF)
        return down.output(self._of_all_places(lambda block: down.project(dropped[block.number], block)))

    def backward(self, g_hidden_nF: Tensor, g_extra: Tensor | None, out: InputGradients) -> Tensor | None:
        assert g_extra is not None
        routing, down = self.routing, self.down
        by_low_nK, by_h_nK = down.output_backward(g_extra), torch.empty_like(routing.weights_nK)
        dropped_NF, gate_NF, up_NF = map(self._of_all_places, (down.widened, self.gate.widened, self.up.widened))
        fused.backward(
            self.gate_nF,
            self.up_nF,
            routing.place_nK,
            routing.weights_nK,
            gate_NF,
            up_NF,
            dropped_NF,
            down.drops.get(routing.whole.number),
            g_hidden_nF,
            out.gate_nF,
            out.up_nF,
            by_h_nK,
        )
        dropped, g_gate, g_up = map(routing.split, (dropped_NF, gate_NF, up_NF))

        def accumulate(block: Block) -> tuple[Tensor, Tensor]:
            i = block.number
            down.accumulate(dropped[i], block)
            return self.gate.add_backward_(g_gate[i], None, block), self.up.add_backward_(g_up[i], None, block)

        g_lows = [_joined(parts) for parts in zip(*on_all_threads(accumulate, routing.blocks), strict=True)]
        for which, a in self.narrowings:
            g_low_MNR = torch.stack([g_lows[i] for i in which]).mul_(down.segment.scaling)
            routing.narrow_backward(g_low_MNR, self.input.x, a, out.x_nD)
        self.input.backward_(out.x_nD)
        return by_h_nK.add_(by_low_nK)

    def _of_all_places(self, of_block: Callable[[Block], Tensor]) -> Tensor:
        return _joined(on_all_threads(of_block, self.routing.blocks))


def _joined(blocks: Sequence[Tensor]) -> Tensor:
    """All places', of each block's."""
    return torch.cat([*blocks]) if len(blocks) > 1 else blocks[0]
