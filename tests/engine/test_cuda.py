"""On a GPU the packed pass is the CPU's float64 one to rounding: bits are promised on the CPU alone."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from engine.base_model import BaseModel
from engine.engine import Engine
from engine.run import Microbatch, Run
from engine.sampling import Sample, advance
from tests.engine.loads import LOADS, build, lora, mixlora, random_row, shake
from tests.models import tiny_model

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can see"),
]
DEVICE = "cuda"
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 0.2}
"""Relative, of log-probs and of a gradient's length; transformers' norms compute in float32 even in float64."""


def engine_on(device: str, dtype: torch.dtype) -> Engine:
    model = tiny_model(dtype=dtype).to(torch.device(device))
    return Engine(BaseModel(model, name="tiny", hash_="tiny", microbatch_tokens=128))


@pytest.fixture(scope="module")
def on_cpu() -> Engine:
    return engine_on("cpu", torch.float64)


@pytest.fixture(scope="module", params=TOLERANCE, ids=str)
def on_gpu(request: pytest.FixtureRequest) -> Engine:
    return engine_on(DEVICE, request.param)


def runs_of(microbatches: list[Microbatch]) -> list[Run]:
    return list({id(m.run): m.run for m in microbatches}.values())


@pytest.mark.parametrize("name", LOADS)
def test_a_packed_pass_is_that_of_the_cpu(on_cpu: Engine, on_gpu: Engine, name: str) -> None:
    """With real dropout, whose masks are the same on every device."""
    tolerance = TOLERANCE[on_gpu.base.dtype]
    expected, got = build(LOADS[name], on_cpu), build(LOADS[name], on_gpu)
    for wanted, outcome in zip(on_cpu.forward_backward(expected), on_gpu.forward_backward(got), strict=True):
        for theirs, ours in zip(wanted.logprobs, outcome.logprobs, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    for theirs, ours in zip(runs_of(expected), runs_of(got), strict=True):
        difference = torch.linalg.vector_norm(ours.gradient.cpu().double() - theirs.gradient)
        assert float(difference) <= tolerance * float(torch.linalg.vector_norm(theirs.gradient))


@pytest.mark.parametrize("make", [lora, mixlora])
def test_training_steps_follow_those_of_the_cpu(on_cpu: Engine, on_gpu: Engine, make: Callable) -> None:
    losses: list[list[float]] = []
    for engine in (on_cpu, on_gpu):
        run = engine.create_run(make(), seed=0)
        rows = [random_row(20, np.random.default_rng(seed)) for seed in range(3)]
        losses.append([])
        for _ in range(5):
            (outcome,) = engine.forward_backward([Microbatch(rows=rows, run=run)])
            engine.optim_step(run, learning_rate=0.01)
            losses[-1].append(outcome.loss)
    np.testing.assert_allclose(losses[1], losses[0], rtol=TOLERANCE[on_gpu.base.dtype], atol=0.05)


def test_greedy_sampling_says_what_the_cpu_says(on_cpu: Engine) -> None:
    samples = []
    for engine in (on_cpu, engine_on(DEVICE, torch.float64)):
        run = engine.create_run(mixlora(), seed=0)
        shake(run, 0)
        samples.append(Sample([5, 17, 300], 10, run.adapter))
        advance(engine.base, [samples[-1]], 10)
    assert samples[0].tokens == samples[1].tokens
    assert samples[1].logprobs == pytest.approx(samples[0].logprobs, abs=1e-5)


def test_a_run_is_saved_and_loaded_on_the_gpu(tmp_path) -> None:
    engine = engine_on(DEVICE, torch.float32)
    run = engine.create_run(mixlora(), seed=0)
    engine.forward_backward([Microbatch(rows=[random_row(20, np.random.default_rng(0))], run=run)])
    engine.save(run, tmp_path)
    loaded = engine.load(tmp_path)
    assert loaded.adapter.flat.device.type == DEVICE
    assert torch.equal(loaded.gradient, run.gradient)
