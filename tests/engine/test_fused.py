"""Loops over experts' elements: what the formulas give, the same bits in any company, and NaN where NaN was."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import GELUTanh, SiLUActivation

from engine import fused
from engine.engine import Engine
from tests.engine.loads import LOADS, build
from tests.models import tiny_base

PADDING, TOP_K = 7, 2
CLOSE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2**-8}
"""Of each element, relative and absolute: to rounding, in bfloat16 the last one."""
WIDTHS = (1, 13, 64, 1013)


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=draw, dtype=torch.float64).mul(2).to(dtype)


class Mixture:
    """Tokens with two places each, among places of padding; what the loops are given for them, and what they made."""

    def __init__(self, dtype: torch.dtype, width: int, tokens: int = 37):
        draw, num_places = torch.Generator().manual_seed(1), TOP_K * tokens + PADDING
        self.place = torch.randperm(num_places, generator=draw)[:-PADDING].view(tokens, TOP_K)
        self.r = torch.rand(tokens, TOP_K, generator=draw).to(torch.promote_types(dtype, torch.float32))
        self.gate_x, self.up_x, self.g_hidden = (random(tokens, width, dtype=dtype, seed=s) for s in range(3))
        self.gate, self.up, self.g_dropped = (random(num_places, width, dtype=dtype, seed=s) for s in range(3, 6))
        self.is_kept = random(num_places, width, seed=6) > -3
        self.dropped = (~self.is_kept).flatten().nonzero().flatten()

    def forward(self, rows: slice = slice(None)) -> list[Tensor]:
        """Σ r h and dropout(h)."""
        place, dropped, hidden = self.place[rows], self.gate.clone(), torch.empty_like(self.gate_x[rows])
        of_tokens = self.gate_x[rows], self.up_x[rows], place, self.r[rows]
        fused.forward(*of_tokens, dropped, self.up, self.dropped, hidden)
        self.assert_padding_is_left(self.gate, dropped)
        return [hidden, dropped[place]]

    def backward(self, rows: slice = slice(None)) -> list[Tensor]:
        """The gradients at W1x, W3x, r, gate and up, and dropout(h)."""
        place, gate, up, dropped = self.place[rows], self.gate.clone(), self.up.clone(), self.g_dropped.clone()
        of_tokens = self.gate_x[rows], self.up_x[rows], place, self.r[rows]
        made = [torch.empty_like(tensor[rows]) for tensor in (self.gate_x, self.up_x, self.r)]
        fused.backward(*of_tokens, gate, up, dropped, self.dropped, self.g_hidden[rows], *made)
        for before, after in ((self.gate, gate), (self.up, up), (self.g_dropped, dropped)):
            self.assert_padding_is_left(before, after)
        return [*made, gate[place], up[place], dropped[place]]

    def assert_padding_is_left(self, before: Tensor, after: Tensor) -> None:
        is_padding = torch.ones(len(before), dtype=torch.bool).index_fill(0, self.place.flatten(), False)
        assert int(is_padding.sum()) == PADDING
        assert torch.equal(before[is_padding], after[is_padding])

    def h(self, *states: Tensor) -> Tensor:
        """Of each slot."""
        gate_x, up_x, gate, up = states or (t.double() for t in (self.gate_x, self.up_x, self.gate, self.up))
        return F.silu(gate_x[:, None] + gate[self.place]) * (up_x[:, None] + up[self.place])

    def formula(self) -> tuple[list[Tensor], list[Tensor]]:
        """The same in float64, by autograd."""
        leaves = [t.double().requires_grad_() for t in (self.gate_x, self.up_x, self.r, self.gate, self.up)]
        gate_x, up_x, r, gate, up = leaves
        h = self.h(gate_x, up_x, gate, up)
        hidden, dropped = (r[..., None] * h).sum(1), h * self.is_kept[self.place]
        value = (self.g_hidden.double() * hidden).sum() + (self.g_dropped.double()[self.place] * dropped).sum()
        *at_tokens, at_gate, at_up = torch.autograd.grad(value, leaves)
        backward = [*at_tokens, at_gate[self.place], at_up[self.place], dropped.detach()]
        return [hidden.detach(), dropped.detach()], backward


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_forward_and_backward_are_the_formulas(dtype: torch.dtype, width: int) -> None:
    mixture, close = Mixture(dtype, width), CLOSE[dtype]
    assert 0 < len(mixture.dropped) < mixture.gate.numel() or width == 1
    h = mixture.h()
    forward, backward = mixture.formula()
    summed = [  # what the sums among them are of
        mixture.r.double()[..., None] * h,
        backward[3],
        backward[4],
        (mixture.g_hidden.double()[:, None] * h).movedim(2, 1),
    ]
    sizes = [terms.abs().sum(1) for terms in summed]
    made = mixture.forward() + mixture.backward()
    for got, want, size in zip(
        made, forward + backward, [sizes[0], forward[1], *sizes[1:], *backward[3:]], strict=True
    ):
        assert got.shape == want.shape
        assert ((got.double() - want).abs() <= close * (1 + size.abs())).all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_a_token_has_the_same_bits_in_any_company(dtype: torch.dtype, width: int) -> None:
    mixture = Mixture(dtype, width)
    for compute in (mixture.forward, mixture.backward):
        whole = compute()
        for rows in (slice(0, 1), slice(3, 20), slice(17, 37)):
            assert all(torch.equal(part, among[rows]) for part, among in zip(compute(rows), whole, strict=True))


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_threads_make_no_difference(dtype: torch.dtype, threads: int) -> None:
    mixture = Mixture(dtype, 64, tokens=3 * fused.ROWS + 5)
    shared = mixture.forward() + mixture.backward()
    torch.set_num_threads(1)
    assert all(map(torch.equal, shared, mixture.forward() + mixture.backward()))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_gated_is_silu_times_up_on_any_number_of_threads(dtype: torch.dtype, width: int, threads: int) -> None:
    gate, up, g_h = (random(2 * fused.ROWS + 5, width, dtype=dtype, seed=s) for s in range(3))
    leaves = [tensor.double().requires_grad_() for tensor in (gate, up)]
    want = F.silu(leaves[0]) * leaves[1]
    wanted = [want.detach(), *torch.autograd.grad(want, leaves, g_h.double())]
    made = []
    for number in (threads, 1):
        torch.set_num_threads(number)
        made.append([torch.empty_like(gate) for _ in range(3)])
        fused.gated(gate, up, made[-1][0])
        fused.gated_backward(gate, up, g_h, *made[-1][1:])
    for shared, alone, want in zip(*made, wanted, strict=True):
        assert torch.equal(shared, alone)
        torch.testing.assert_close(shared.double(), want, rtol=CLOSE[dtype], atol=CLOSE[dtype])


def test_silu_in_float32_is_right_to_a_few_units_in_the_last_place() -> None:
    gate = torch.linspace(-80, 80, 100_003)[None]
    h, ones = torch.empty_like(gate), torch.ones_like(gate)
    fused.gated(gate, ones, h)
    torch.testing.assert_close(h.double(), F.silu(gate.double()), rtol=4 * 2**-24, atol=0)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_combine_is_the_weighted_sum_on_any_number_of_threads(dtype: torch.dtype, top_k: int, threads: int) -> None:
    precise, tokens = torch.promote_types(dtype, torch.float32), 3 * fused.ROWS + 5
    x, place = (
        random(900, 13, dtype=dtype),
        torch.randint(900, (tokens, top_k), generator=torch.Generator().manual_seed(0)),
    )
    weights = torch.rand(tokens, top_k, generator=torch.Generator().manual_seed(1)).to(precise)
    out, alone = x.new_empty(tokens, 13), x.new_empty(tokens, 13)
    fused.combine(x, place, weights, out)
    want = (x.double()[place] * weights.double()[..., None]).sum(1)
    torch.testing.assert_close(out.double(), want, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    torch.set_num_threads(1)
    fused.combine(x, place, weights, alone)
    assert torch.equal(out, alone)


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    """Products of bfloat16 and float32, so that ties are among them."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    x, place = every[:, None].contiguous(), torch.arange(len(every))[:, None]
    for weight in (1.0, 1 + 2**-8, 0.3, 2.0**-126, 2.0**127):
        weights, out = torch.full((len(every), 1), weight), torch.empty_like(x)
        fused.combine(x, place, weights, out)
        torch.testing.assert_close(out, (x.float() * weights).bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_no_nan_becomes_a_number() -> None:
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    assert nans.isnan().all()
    out = torch.empty(len(nans), 1, dtype=torch.bfloat16)
    fused.combine(torch.ones_like(out), torch.arange(len(nans))[:, None], nans[:, None], out)
    assert out.isnan().all()


def test_nothing_is_written_beside_a_row() -> None:
    memory = torch.ones(30)
    gate, ones = memory[10:20].view(2, 5), torch.ones(2, 5)
    drops = torch.tensor([-(2**63), -1, 3, 5, 9, 10, 2**62])
    fused.forward(ones[:1], ones[:1], torch.tensor([[1]]), ones[:1, :1], gate, ones, drops, torch.empty(1, 5))
    assert (memory != 1).nonzero().flatten().tolist() == list(range(15, 20))
    assert (gate == 0).nonzero().tolist() == [[1, 0], [1, 4]]


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_large_states_are_finite_and_what_is_no_number_stays_so(dtype: torch.dtype) -> None:
    gate = torch.tensor([[-1e4, -100, -88, -0.0, 0, 88, 100, 1e4, torch.inf, torch.nan]], dtype=dtype)
    zeros, place, up = torch.zeros_like(gate), torch.zeros(1, 1, dtype=torch.int64), torch.ones_like(gate)
    one = torch.ones(1, 1, dtype=torch.promote_types(dtype, torch.float32))
    hidden, dropped = torch.empty_like(gate), gate.clone()
    fused.forward(zeros, zeros, place, one, dropped, up, None, hidden)
    torch.testing.assert_close(hidden, F.silu(gate), rtol=CLOSE[dtype], atol=1e-30, equal_nan=True)
    assert torch.equal(hidden.nan_to_num(7), dropped.nan_to_num(7))
    at_gate, at_up, g_gate, g_up, g_r = gate.clone(), up.clone(), up.clone(), up.clone(), one.clone()
    fused.backward(zeros, zeros, place, one, at_gate, at_up, zeros.clone(), None, up, g_gate, g_up, g_r)
    finite = gate.isfinite()
    for gradient in (at_gate, at_up, g_gate, g_up):
        assert gradient[finite].isfinite().all()
        assert gradient[0, -1].isnan()
    assert g_r.isnan().all()


@pytest.mark.parametrize("name", ["four different", "top_k is num_experts", "rsLoRA and no dropout"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_pass_comes_to_what_torchs_operations_come_to(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, looped_over, gradients = Engine(tiny_base(dtype=dtype)), [], []
    for loop in (fused.forward, fused.backward):
        monkeypatch.setattr(
            fused, loop.__name__, lambda *tensors, loop=loop: looped_over.append((loop, loop(*tensors)))
        )
    for takes in (True, False):
        monkeypatch.setattr(fused, "takes", lambda act, x, takes=takes: takes)
        looped_over.clear()
        microbatches = build(LOADS[name], engine)
        engine.forward_backward(microbatches)
        assert {loop.__name__ for loop, _ in looped_over} == ({"forward", "backward"} if takes else set())
        gradients.append([m.run.gradient for m in microbatches])
    for looped, by_torch in zip(*gradients, strict=True):
        close = {"rtol": 1e-9, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(looped, by_torch, **close)


def test_there_are_loops_for_silu_on_a_cpu() -> None:
    on_cpu, on_gpu = torch.empty(0), torch.empty(0, device="meta")
    assert fused.takes(SiLUActivation(), on_cpu)
    assert not fused.takes(GELUTanh(), on_cpu)
    assert not fused.takes(SiLUActivation(), on_gpu)
