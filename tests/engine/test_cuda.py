"""On a GPU every operation is the CPU's to rounding: bits are promised on the CPU alone.

That no layer waits for the GPU is in `test_no_waiting`, that the benchmark runs there in `tests/benchmarks`.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engine import grouped, memory
from engine.attention import one_kernel, one_sequence, packed
from engine.base_model import BaseModel, Fingerprint, load
from engine.config import AdapterConfig
from engine.engine import Engine
from engine.families import FAMILIES
from engine.grouped import Together
from engine.probe import fewest_rows, probe
from engine.random import DropoutKey
from engine.run import Microbatch, Run
from engine.sampling import Sample, advance, scoring
from engine.segments import Segment, pack
from tests.base_folder import write_tiny_base
from tests.engine.loads import LOADS, beside_one_that_is_broken, build, lora, mixlora, random_row, shake
from tests.engine.others import publish
from tests.engine.test_grouped import EXPERTS, LIKE, PRODUCTS, SLICES
from tests.engine.test_grouped import LOADS as PLACED
from tests.models import tiny_model

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can see"),
]
DEVICE = "cuda"
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3, torch.bfloat16: 0.2}
"""Relative, of log-probs and of a gradient's length; transformers' norms compute in float32 even in float64."""
DRAW = DropoutKey.fill_
ADAPTERS = {"LoRA": lora(), "DoRA": lora(dora=True), "MixLoRA": mixlora(), "MixDoRA": mixlora(dora=True)}


@pytest.fixture(autouse=True)
def _the_masks_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes on the CPU take the forms of a GPU, and the GPU has the masks that are drawn for them there."""
    monkeypatch.setattr("engine.device.may_look", lambda device: False)

    def fill_(key: DropoutKey, mask: Tensor, layer: int) -> None:
        drawn = torch.empty(mask.shape, dtype=torch.bool)
        DRAW(key, drawn, layer)
        mask.copy_(drawn)

    monkeypatch.setattr(DropoutKey, "fill_", fill_)


def engine_on(device: str, dtype: torch.dtype, model_type: str = "llama", *, recompute: bool = False) -> Engine:
    model = tiny_model(model_type, dtype).to(torch.device(device))
    return Engine(BaseModel(model, name="tiny", hash_="tiny", microbatch_tokens=128, recompute=recompute))


@pytest.fixture(scope="module")
def on_cpu() -> Engine:
    return engine_on("cpu", torch.float64)


@pytest.fixture(scope="module", params=TOLERANCE, ids=str)
def on_gpu(request: pytest.FixtureRequest) -> Engine:
    return engine_on(DEVICE, request.param)


def runs_of(microbatches: list[Microbatch]) -> list[Run]:
    return list({id(m.run): m.run for m in microbatches if m.run}.values())


def assert_near(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """By the length of the difference."""
    difference = torch.linalg.vector_norm(got.cpu().double() - expected.double())
    assert float(difference) <= tolerance * float(torch.linalg.vector_norm(expected.double()))


def assert_same_pass(expected: Engine, got: Engine, name: str, tolerance: float) -> None:
    """In bfloat16 a router's near ties may fall the other way: a gradient is compared where they fell the same."""
    theirs, ours = build(LOADS[name], expected), build(LOADS[name], got)
    fell_otherwise: set[int] = set()
    outcomes = zip(expected.forward_backward(theirs), got.forward_backward(ours), strict=True)
    for microbatch, (wanted, outcome) in zip(ours, outcomes, strict=True):
        for row, own in zip(wanted.logprobs, outcome.logprobs, strict=True):
            torch.testing.assert_close(own.double(), row.double(), rtol=tolerance, atol=tolerance)
        if wanted.expert_loads is not None and not torch.equal(wanted.expert_loads, outcome.expert_loads):
            assert got.base.dtype is torch.bfloat16
            fell_otherwise.add(id(microbatch.run))
    for wanted_run, run in zip(runs_of(theirs), runs_of(ours), strict=True):
        if id(run) not in fell_otherwise:
            assert_near(run.gradient, wanted_run.gradient, tolerance)


@pytest.mark.parametrize("name", LOADS)
def test_a_packed_pass_is_that_of_the_cpu(on_cpu: Engine, on_gpu: Engine, name: str) -> None:
    """With real dropout, whose masks are the same on every device."""
    assert_same_pass(on_cpu, on_gpu, name, TOLERANCE[on_gpu.base.dtype])


@pytest.mark.parametrize("name", LOADS)
def test_a_packed_forward_is_that_of_the_cpu(on_cpu: Engine, on_gpu: Engine, name: str) -> None:
    tolerance = TOLERANCE[on_gpu.base.dtype]
    expected, got = (
        engine.forward([Microbatch(rows=m.rows, adapter=m.run.adapter) for m in build(LOADS[name], engine) if m.run])
        for engine in (on_cpu, on_gpu)
    )
    for wanted, outcome in zip(expected, got, strict=True):
        torch.testing.assert_close(
            torch.cat(outcome.logprobs).double(), torch.cat(wanted.logprobs), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("name", ["four different", "DoRA beside MixDoRA and MixLoRA"])
def test_recomputed_layers_are_those_of_the_cpu(on_cpu: Engine, name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_same_pass(on_cpu, engine_on(DEVICE, dtype, recompute=True), name, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_is_that_of_the_cpu(model_type: str, dtype: torch.dtype) -> None:
    """Windows (mistral, gemma2), soft-caps (gemma2), grouped heads (all)."""
    on_cpu, on_gpu = engine_on("cpu", torch.float64, model_type), engine_on(DEVICE, dtype, model_type)
    assert_same_pass(on_cpu, on_gpu, "LoRA beside MixLoRA", TOLERANCE[dtype])


@pytest.mark.parametrize("config", [lora(8), mixlora(8)], ids=["LoRA", "MixLoRA"])
def test_what_is_not_a_number_in_one_job_reaches_no_other(config: AdapterConfig) -> None:
    """Though they ride as one segment."""
    engine = engine_on(DEVICE, torch.bfloat16)
    for whole, beside in beside_one_that_is_broken(engine, config):
        assert_near(beside, whole.cpu(), 0.02)


def test_a_gpu_draws_the_masks_that_a_key_says() -> None:
    key = DropoutKey(seed=1, step=2, microbatch=3, probability=0.2)
    masks = [torch.empty(400, 300, dtype=torch.bool, device=DEVICE) for _ in range(4)]
    for mask, mine, layer in zip(masks, (key, key, key, replace(key, step=3)), (0, 0, 1, 0), strict=True):
        DRAW(mine, mask, layer)
    assert torch.equal(masks[0], masks[1])
    for first, second in combinations([masks[0], *masks[2:]], 2):
        assert float((first & second).float().mean()) == pytest.approx(0.04, abs=0.005)
    assert all(float(mask.float().mean()) == pytest.approx(0.2, abs=0.01) for mask in masks)


def test_a_run_rides_in_company_as_it_does_alone() -> None:
    """To rounding."""
    engine = engine_on(DEVICE, torch.float32)
    together, alone = build(LOADS["four different"], engine), build(LOADS["four different"], engine)
    engine.forward_backward(together)
    for microbatch in alone:
        engine.forward_backward([microbatch])
    for expected, run in zip(runs_of(alone), runs_of(together), strict=True):
        assert_near(run.gradient, expected.gradient.cpu(), 1e-3)


@pytest.mark.parametrize("name", ADAPTERS)
def test_training_steps_follow_those_of_the_cpu(on_cpu: Engine, on_gpu: Engine, name: str) -> None:
    losses: list[list[float]] = []
    for engine in (on_cpu, on_gpu):
        run = engine.create_run(ADAPTERS[name], seed=0)
        rows = [random_row(20, np.random.default_rng(seed)) for seed in range(3)]
        losses.append([])
        for _ in range(5):
            (outcome,) = engine.forward_backward([Microbatch(rows=rows, run=run)])
            engine.optim_step(run, learning_rate=0.01)
            losses[-1].append(outcome.loss)
    np.testing.assert_allclose(losses[1], losses[0], rtol=TOLERANCE[on_gpu.base.dtype], atol=0.05)


def test_optimizer_steps_are_those_of_the_cpu() -> None:
    """With decay, clipping and LoRA+, from the same gradients."""
    norms, flats = [], []
    for device in ("cpu", DEVICE):
        engine = engine_on(device, torch.float32)
        run = engine.create_run(lora(), seed=0)
        norms.append([])
        for step in range(4):
            run.gradient.copy_(torch.randn(run.gradient.shape, generator=torch.Generator().manual_seed(step)))
            norms[-1].append(engine.optim_step(run, learning_rate=0.01, weight_decay=0.1, loraplus_ratio=4.0))
        flats.append(run.adapter.flat.cpu())
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    torch.testing.assert_close(flats[1], flats[0], rtol=1e-4, atol=1e-5)


def test_a_gradient_that_is_no_number_changes_nothing() -> None:
    engine = engine_on(DEVICE, torch.float32)
    run = engine.create_run(lora(), seed=0)
    before = run.adapter.flat.clone()
    run.gradient[3] = torch.nan
    assert np.isnan(engine.optim_step(run, learning_rate=0.01))
    assert torch.equal(run.adapter.flat, before)


@pytest.mark.parametrize("name", ADAPTERS)
def test_greedy_sampling_says_what_the_cpu_says(on_cpu: Engine, name: str) -> None:
    samples = []
    for engine in (on_cpu, engine_on(DEVICE, torch.float64)):
        run = engine.create_run(ADAPTERS[name], seed=0)
        shake(run, 0)
        samples.append([Sample([5, 17, 300], 10, run.adapter), Sample([8, 9], 6), Sample([7], 4, run.adapter)])
        advance(engine.base, samples[-1], 3)
        advance(engine.base, samples[-1], 10)
    for expected, got in zip(*samples, strict=True):
        assert got.tokens == expected.tokens
        assert got.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def test_a_prompt_is_scored_as_on_the_cpu(on_cpu: Engine, on_gpu: Engine) -> None:
    (expected,), (got,) = (engine.forward([scoring([5, 17, 300, 4], None)]) for engine in (on_cpu, on_gpu))
    tolerance = TOLERANCE[on_gpu.base.dtype]
    torch.testing.assert_close(got.logprobs[0].double(), expected.logprobs[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("there", "here"), [(DEVICE, DEVICE), (DEVICE, "cpu"), ("cpu", DEVICE)])
def test_a_run_is_saved_and_loaded(there: str, here: str, tmp_path: Path) -> None:
    """In the middle of a step, and not bound to the device that it was saved on."""
    engine = engine_on(there, torch.float32)
    run = engine.create_run(mixlora(), seed=0)
    for _ in range(2):
        engine.optim_step(run, learning_rate=0.01)
        engine.forward_backward([Microbatch(rows=[random_row(20, np.random.default_rng(0))], run=run)])
    engine.save(run, tmp_path)
    loaded = engine_on(here, torch.float32).load(tmp_path)
    assert loaded.adapter.flat.device.type == here
    assert (loaded.step, loaded.microbatch) == (run.step, run.microbatch)
    for got, saved in (
        (loaded.adapter.flat, run.adapter.flat),
        (loaded.gradient, run.gradient),
        (loaded.optimizer.first, run.optimizer.first),
        (loaded.optimizer.second, run.optimizer.second),
    ):
        assert torch.equal(got.cpu(), saved.cpu())


@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS)
def test_a_run_starts_from_files(config: AdapterConfig, tmp_path: Path) -> None:
    engine = engine_on(DEVICE, torch.float32)
    first = engine.create_run(config, seed=3)
    shake(first, 3)
    publish(engine, first, tmp_path)
    run = engine.create_run(config, 42, tmp_path)
    assert run.adapter.flat.device.type == engine.load_adapter(tmp_path).flat.device.type == DEVICE
    assert torch.equal(run.adapter.flat, first.adapter.flat)
    assert torch.equal(engine.load_adapter(tmp_path).flat, first.adapter.flat)


@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS)
def test_a_run_starts_with_the_weights_that_it_has_on_the_cpu(config: AdapterConfig) -> None:
    expected, got = (engine_on(device, torch.float32).create_run(config, seed=5) for device in ("cpu", DEVICE))
    torch.testing.assert_close(got.adapter.flat.cpu(), expected.adapter.flat, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=["heads", "grouped heads"])
def test_one_kernel_attends_within_each_sequence(window: int | None, heads: tuple[int, int]) -> None:
    batch = pack([Segment([torch.zeros(n, dtype=torch.int64) for n in (1, 37, 20, 7)])], torch.device(DEVICE))
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, n, len(batch.tokens), 16, generator=draw).to(DEVICE, torch.bfloat16).requires_grad_()
        for n in (heads[0], heads[1], heads[1])
    )
    if not one_kernel(q, batch):
        pytest.skip("this GPU or torch has no kernel for sequences of many lengths")
    y = packed(q, k, v, batch, 0.3, window)
    g = torch.randn(y.shape, generator=draw)
    got = torch.autograd.grad(y, (q, k, v), g.to(y))
    precise = [tensor.detach().cpu().double().requires_grad_() for tensor in (q, k, v)]
    parts = zip(*(tensor.split(batch.lengths, dim=2) for tensor in precise), strict=True)
    expected = torch.cat([one_sequence(*part, 0.3, window) for part in parts], 2).transpose(1, 2)
    assert_near(y.detach(), expected.detach(), 0.02)
    for ours, theirs in zip(got, torch.autograd.grad(expected, precise, g.double()), strict=True):
        if theirs.any():
            assert_near(ours, theirs, 0.02)
        else:  # at q and k of a window of one
            assert float(ours.abs().max()) < 1e-4


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("kernel", [False, True], ids=["one plain matmul", "torch's grouped matmul"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_of_experts_are_those_of_the_cpu(
    product: Callable, kernel: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch has no kernel it takes the sizes to the host itself."""
    monkeypatch.setattr(grouped, "has_kernel", lambda x, w: kernel)
    loads_E = torch.tensor(PLACED, device=DEVICE)
    together = Together(torch.arange(EXPERTS, device=DEVICE).repeat_interleave(loads_E), loads_E)
    got = product(together, torch.empty(0, device=DEVICE, dtype=dtype))
    assert_near(got, product(SLICES, LIKE), 1e-3 if dtype is torch.float32 else 0.02)


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_is_measured(recompute: bool) -> None:
    engine = engine_on(DEVICE, torch.float32, recompute=recompute)
    measured = memory.measure(engine.base)
    assert measured.weights == sum(parameter.nbytes for parameter in engine.base.model.parameters())
    assert min(measured.kept_per_token, measured.backward_per_token, measured.head) > 0


def test_a_base_is_loaded_from_its_folder_and_probed(tmp_path: Path) -> None:
    base = load(write_tiny_base(tmp_path), name="tiny", dtype=torch.bfloat16, device=DEVICE)
    assert base.device.type == Fingerprint.of(base).device == DEVICE
    assert min(probe(DEVICE).values()) > 0
    assert fewest_rows(base, 256) <= 256
    assert Engine(base).threads_to_share() == 1
