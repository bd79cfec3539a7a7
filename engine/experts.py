"""The experts of one segment in one layer, forward and backward by hand (paper §3.2, eq. 5 and 6; Algorithm 1).

Expert e has its own LoRA beside the shared gate (W1), up (W3) and down (W2). A is applied to all tokens for all
experts at once, one matmul of E·R columns, and so is the B of down: both are cheaper than one for each expert. The
B of gate and up and the A of down work on each expert's own rows. Kept for the backward are x, W1x, W3x, the routing
and activations of rank R; the states of the experts are computed again.

Legend: n a segment's tokens, N their slots sorted by expert, D hidden, F feed-forward width, R rank, E experts,
X = E·R.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.adapter import Parameter
from engine.dora import Magnitude
from engine.router import Routing
from engine.segments import Dropped, Segment

Activation = Callable[[Tensor], Tensor]


@dataclass
class ExpertLora:
    """The experts' LoRA beside gate or up: one input for all experts, one output for each slot."""

    a: Parameter  # [E, R, D]
    b: Parameter  # [E, R, F]
    scaling: float
    routing: Routing
    magnitudes: list[Magnitude]  # of each expert (MixDoRA), or none

    def project(self, x_nD: Tensor) -> None:
        """Ax, kept for `add_` and `backward`."""
        dense_nX = F.linear(x_nD, self.a.value.flatten(0, 1))
        self.low_NR = self.routing.from_cells(dense_nX).mul_(self.scaling)

    def add_(self, y_NF: Tensor) -> None:
        """y += s·Ax B for each expert's rows, in place; then the magnitudes."""
        for expert, start, stop in self.routing.ranges:
            y_NF[start:stop].addmm_(self.low_NR[start:stop], self.b.value[expert])
        if self.magnitudes:
            self.z_NF = y_NF.clone()
            for expert, start, stop in self.routing.ranges:
                y_NF[start:stop] = self.magnitudes[expert].apply(self.z_NF[start:stop])

    def backward(self, g_NF: Tensor, x_nD: Tensor, g_x_nD: Tensor) -> None:
        """Adds the gradient at x to `g_x_nD`; `g_NF` becomes the gradient at the frozen module's output."""
        g_low_NR = torch.empty_like(self.low_NR)
        for expert, start, stop in self.routing.ranges:
            g_nF = g_NF[start:stop]
            if self.magnitudes:
                g_nF.copy_(self.magnitudes[expert].backward(g_nF, self.z_NF[start:stop]))
            torch.mm(g_nF, self.b.value[expert].t(), out=g_low_NR[start:stop])
            self.b.expert(expert).accumulate(self.low_NR[start:stop].t() @ g_nF)
        dense_nX = self.routing.to_cells(g_low_NR.mul_(self.scaling))
        self.a.accumulate(dense_nX.t() @ x_nD)
        g_x_nD.addmm_(dense_nX, self.a.value.flatten(0, 1))


@dataclass
class DownLora:
    """The experts' LoRA beside down, up to its A; B is applied after the frozen W2, for all experts at once."""

    a: Parameter  # [E, R, F]
    segment: Segment
    layer: int
    input_name: str
    routing: Routing

    def forward(self, h_NF: Tensor) -> Tensor:
        """r·s·A dropout(h) of each slot, in the cells of its expert: [n, X]."""
        self.places = self._places(h_NF)
        dropped_NF = Dropped.of(h_NF, self.places).x
        self.low_NR = h_NF.new_empty(len(h_NF), self.a.value.shape[1])
        for expert, start, stop in self.routing.ranges:
            torch.mm(dropped_NF[start:stop], self.a.value[expert].t(), out=self.low_NR[start:stop])
        self.low_NR.mul_(self.segment.scaling)
        return self.routing.to_cells(self.low_NR * self._weights_N1())

    def backward(self, g_nX: Tensor, h_NF: Tensor, g_h_NF: Tensor, g_r_N: Tensor) -> None:
        """Adds to the gradients at h and at the routing weights."""
        g_low_NR = self.routing.from_cells(g_nX)
        g_r_N += (g_low_NR * self.low_NR).sum(-1, dtype=g_r_N.dtype)
        g_low_NR.mul_(self._weights_N1()).mul_(self.segment.scaling)
        dropped, g_NF = Dropped.of(h_NF, self.places), torch.empty_like(h_NF)
        for expert, start, stop in self.routing.ranges:
            a = self.a.expert(expert)
            a.accumulate(g_low_NR[start:stop].t() @ dropped.x[start:stop])
            torch.mm(g_low_NR[start:stop], a.value, out=g_NF[start:stop])
        g_h_NF += dropped.backward_(g_NF)

    def _weights_N1(self) -> Tensor:
        return self.routing.weights_N[:, None].to(self.a.value.dtype)

    def _places(self, h_NF: Tensor) -> Tensor | None:
        """The dropped elements of h; each expert has a mask of its own."""
        dropout, width = self.segment.dropout, h_NF.shape[1]
        if dropout is None:
            return None
        drawn = [
            dropout.dropped(self.layer, f"{self.input_name}.{expert}", (stop - start) * width) + start * width
            for expert, start, stop in self.routing.ranges
        ]
        return torch.cat(drawn).to(h_NF.device)


@dataclass(frozen=True)
class InputGradients:
    """Where a backward writes: a segment's rows of the gradients at x (0 before), W1x and W3x."""

    x_nD: Tensor
    gate_nF: Tensor
    up_nF: Tensor


@dataclass
class Experts:
    """h_k = act(W1x + …)·(W3x + …) for each slot, and what the frozen W2 and the B of down take of it."""

    routing: Routing
    activation: Activation
    input: Dropped  # x after dropout
    gate: ExpertLora | None
    up: ExpertLora | None
    down: DownLora | None
    splits_down: bool

    def forward(self, gate_nF: Tensor, up_nF: Tensor, hidden_nF: Tensor) -> Tensor:
        """Writes Σ_k r_k h_k, which goes through W2; returns what goes through the B of down [n, X].

        Where the experts have a W2 each (`splits_down`) 0 is written, and h [N, F] returned.
        """
        self.gate_nF, self.up_nF = gate_nF, up_nF
        for lora in (self.gate, self.up):
            if lora is not None:
                lora.project(self.input.x)
        gate_NF, up_NF = self._states()
        h_NF = self.activation(gate_NF).mul_(up_NF)
        if self.splits_down:
            hidden_nF.zero_()
            return h_NF
        self.routing.combine(h_NF, hidden_nF)
        return h_NF.new_empty(0) if self.down is None else self.down.forward(h_NF)

    def backward(self, g_hidden_nF: Tensor, g_extra: Tensor | None, out: InputGradients) -> Tensor | None:
        """From the gradients of what `forward` wrote and returned; returns that of the routing weights [n, K]."""
        gate_NF, up_NF = self._states()
        with torch.enable_grad():
            activated_NF = self.activation(gate_NF.requires_grad_())
        a_NF, g_r_nK = activated_NF.detach(), None
        if self.splits_down:
            assert g_extra is not None
            g_h_NF = g_extra
        else:
            h_NF = a_NF * up_NF
            g_h_NF, g_r_N = self.routing.combine_backward(g_hidden_nF, h_NF)
            if self.down is not None:
                assert g_extra is not None
                self.down.backward(g_extra, h_NF, g_h_NF, g_r_N)
            g_r_nK = g_r_N[self.routing.place_nK]
        g_up_NF = g_h_NF * a_NF
        (g_gate_NF,) = torch.autograd.grad(activated_NF, gate_NF, g_h_NF * up_NF)
        for lora, g_NF in ((self.gate, g_gate_NF), (self.up, g_up_NF)):
            if lora is not None:
                lora.backward(g_NF, self.input.x, out.x_nD)
        self.input.backward_(out.x_nD)
        self.routing.collect(g_gate_NF, out.gate_nF)
        self.routing.collect(g_up_NF, out.up_nF)
        return g_r_nK

    def _states(self) -> tuple[Tensor, Tensor]:
        """Gate and up of each slot [N, F], with the experts' LoRA."""
        gate_NF, up_NF = self.routing.dispatch(self.gate_nF), self.routing.dispatch(self.up_nF)
        if self.gate is not None:
            self.gate.add_(gate_NF)
        if self.up is not None:
            self.up.add_(up_NF)
        return gate_NF, up_NF
