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

TOKENS, PLACES, TOP_K = 37, 48, 2
CLOSE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2**-8}
"""Of each element, relative and absolute: to rounding, in bfloat16 the last one."""
WIDTHS = (1, 13, 64, 1013)


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=draw, dtype=torch.float64).mul(2).to(dtype)


class Block:
    """Places of a few tokens, what the loops are given for them, and what they made of it."""

    def __init__(self, dtype: torch.dtype, width: int):
        self.token = torch.randint(TOKENS, (PLACES,), generator=torch.Generator().manual_seed(1))
        self.r = torch.rand(PLACES, generator=torch.Generator().manual_seed(2)).to(
            torch.promote_types(dtype, torch.float32)
        )
        self.gate_x, self.up_x, self.g_hidden = (random(TOKENS, width, dtype=dtype, seed=s) for s in range(3))
        self.gate, self.up, self.g_dropped = (random(PLACES, width, dtype=dtype, seed=s) for s in range(3, 6))
        self.is_kept = random(PLACES, width, seed=6) > -3
        self.places = (~self.is_kept).flatten().nonzero().flatten()

    def forward(self, rows: slice) -> list[Tensor]:
        """h and dropout(h)."""
        dropped, h = self.gate[rows].clone(), torch.empty_like(self.gate[rows])
        places = (~self.is_kept[rows]).flatten().nonzero().flatten()
        fused.forward(self.gate_x, self.up_x, self.token[rows], dropped, self.up[rows], places, h)
        return [h, dropped]

    def backward(self, rows: slice) -> list[Tensor]:
        """The gradients at gate, up and r, and dropout(h)."""
        gate, up, dropped = (tensor[rows].clone() for tensor in (self.gate, self.up, self.g_dropped))
        g_r, places = torch.ones_like(self.r[rows]), (~self.is_kept[rows]).flatten().nonzero().flatten()
        fused.backward(
            self.gate_x, self.up_x, self.g_hidden, self.token[rows], self.r[rows], gate, up, dropped, places, g_r
        )
        return [gate, up, g_r - 1, dropped]

    def formula(self) -> tuple[list[Tensor], list[Tensor]]:
        """The same in float64, by autograd."""
        gate, up, r = (tensor.double().requires_grad_() for tensor in (self.gate, self.up, self.r))
        h = F.silu(self.gate_x.double()[self.token] + gate) * (self.up_x.double()[self.token] + up)
        dropped = h * self.is_kept
        value = (self.g_hidden.double()[self.token] * r[:, None] * h).sum() + (self.g_dropped.double() * dropped).sum()
        gradients = torch.autograd.grad(value, (gate, up, r))
        return [h.detach(), dropped.detach()], [*gradients, dropped.detach()]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_forward_and_backward_are_the_formulas(dtype: torch.dtype, width: int) -> None:
    block, close = Block(dtype, width), CLOSE[dtype]
    assert 0 < len(block.places) < PLACES * width or width == 1
    formula = block.formula()
    for made, expected in zip((block.forward(slice(None)), block.backward(slice(None))), formula, strict=True):
        for got, want in zip(made, expected, strict=True):
            if got.dim() == 2:
                torch.testing.assert_close(got.double(), want, rtol=close, atol=close)
            else:  # sums of products
                sizes = (block.g_hidden.double()[block.token] * formula[0][0]).abs().sum(1) + 1
                assert ((got.double() - want).abs() <= close * sizes).all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_a_row_has_the_same_bits_in_any_block(dtype: torch.dtype, width: int) -> None:
    block = Block(dtype, width)
    for compute in (block.forward, block.backward):
        whole = compute(slice(None))
        for start, stop in ((0, 1), (3, 20), (17, PLACES)):
            rows = slice(start, stop)
            assert all(torch.equal(part, among[rows]) for part, among in zip(compute(rows), whole, strict=True))


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


def test_nothing_is_written_beside_a_block() -> None:
    memory = torch.ones(30)
    h, ones = memory[10:20].view(1, 10), torch.ones(1, 10)
    places = torch.tensor([-(2**63), -1, 3, 10, 2**62])
    fused.forward(ones, ones, torch.zeros(1, dtype=torch.int64), h, ones, places, torch.empty(1, 10))
    assert (memory != 1).nonzero().flatten().tolist() == list(range(10, 20))
    assert (h == 0).flatten().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_large_states_are_finite_and_what_is_no_number_stays_so(dtype: torch.dtype) -> None:
    gate = torch.tensor([[-1e4, -100, -88, -0.0, 0, 88, 100, 1e4, torch.inf, torch.nan]], dtype=dtype)
    zeros, token = torch.zeros_like(gate), torch.zeros(1, dtype=torch.int64)
    h, dropped, up = torch.empty_like(gate), gate.clone(), torch.ones_like(gate)
    fused.forward(zeros, zeros, token, dropped, up, None, h)
    torch.testing.assert_close(h, F.silu(gate), rtol=CLOSE[dtype], atol=1e-30, equal_nan=True)
    assert torch.equal(h.nan_to_num(7), dropped.nan_to_num(7))
    g_gate, g_up, g_r = gate.clone(), up.clone(), torch.zeros(1, dtype=torch.promote_types(dtype, torch.float32))
    fused.backward(zeros, zeros, up, token, torch.ones_like(g_r), g_gate, g_up, torch.zeros_like(gate), None, g_r)
    finite = gate.isfinite()
    assert g_gate[finite].isfinite().all()
    assert g_up[finite].isfinite().all()
    assert g_gate[0, -1].isnan()
    assert g_up[0, -1].isnan()
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
