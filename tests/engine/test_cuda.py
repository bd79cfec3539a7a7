"""On a GPU a pass equals the CPU's up to rounding: masks are drawn on the CPU, and nothing else names a device."""

import pytest
import torch

from engine.base_model import BaseModel
from engine.engine import Engine
from tests.engine.loads import LOADS, build
from tests.models import tiny_base, tiny_model

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
DEVICE = "cuda"


@pytest.mark.parametrize("name", LOADS)
def test_a_pass_and_a_step_on_the_gpu_equal_those_on_the_cpu(name: str) -> None:
    gpu = BaseModel(tiny_model(dtype=torch.float64).to(DEVICE), name="tiny", hash_="tiny", microbatch_tokens=128)  # type: ignore[arg-type]
    on_cpu, on_gpu = Engine(tiny_base(dtype=torch.float64)), Engine(gpu)
    expected, found = build(LOADS[name], on_cpu), build(LOADS[name], on_gpu)
    for want, got in zip(on_cpu.forward_backward(expected), on_gpu.forward_backward(found), strict=True):
        torch.testing.assert_close(torch.cat(got.logprobs), torch.cat(want.logprobs), rtol=1e-9, atol=1e-9)
    for want, got in zip(expected, found, strict=True):
        assert want.run is not None
        assert got.run is not None
        for engine, run in ((on_cpu, want.run), (on_gpu, got.run)):
            engine.optim_step(run, learning_rate=1e-3)
        torch.testing.assert_close(got.run.adapter.flat.cpu(), want.run.adapter.flat, rtol=1e-8, atol=1e-8)
