"""DoRA's norm is that of the adapted matrix, and its magnitudes are trained, saved and scaled by in float32."""

import pytest
import torch
from torch import nn

from engine import dora
from engine.adapter import Parameter, Weights
from engine.config import AdapterConfig
from engine.engine import Engine
from engine.run import Microbatch
from tests.engine.loads import LOADS, build, lora, mixlora, shake
from tests.models import tiny_base

CONFIGS = {
    "DoRA": lora(4, dora=True),
    "MixDoRA": mixlora(3, 5, 2, dora=True),
    "with rsLoRA": mixlora(4, 3, 1, dora=True, rslora=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [2, 4], indirect=True)
def test_a_norm_has_the_same_bits_on_any_number_of_threads(threads: int, dtype: torch.dtype) -> None:
    """Threads that shared its products of few rows, of rank 6 for instance, would sum them in another order."""
    draw = torch.Generator().manual_seed(0)
    frozen = nn.Linear(576, 1536, bias=False).to(dtype)
    for rank in range(1, 20):
        a_RD, b_RO = (torch.randn(rank, width, generator=draw) for width in (576, 1536))
        pair = [Parameter(matrix.to(dtype), matrix, None) for matrix in (a_RD, b_RO)]
        norms = []
        for each in (threads, 1):
            torch.set_num_threads(each)
            norms.append(dora.norm(frozen, dora.row_norm(frozen), *pair, 2.0))
        assert torch.equal(*norms), rank


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_norm_from_products_is_the_norm_of_the_matrix(config: AdapterConfig) -> None:
    engine = Engine(tiny_base(dtype=torch.float64))
    run = engine.create_run(config, seed=0)
    shake(run, 0)
    weights = Weights.of(run.adapter, torch.float64)
    for (layer, module), linear in engine.base.linears.items():
        a, b = (weights.parameter(layer, module, matrix) for matrix in "AB")
        got = dora.norm(linear.frozen, linear.frozen_norm_O, a, b, config.scaling)
        direct = (linear.frozen.weight + config.scaling * b.value.mT @ a.value).norm(dim=-1)
        torch.testing.assert_close(got, direct, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fresh_adapter_changes_nothing(config: AdapterConfig, dtype: torch.dtype) -> None:
    """B is 0 and m the norm of the frozen rows: the factor is 1 to the bit."""
    engine = Engine(tiny_base(dtype=dtype))
    run = engine.create_run(config, seed=0)
    microbatches = build(LOADS["one job"], engine)
    (base,) = engine.forward([Microbatch(rows=microbatches[0].rows)])
    (adapted,) = engine.forward([Microbatch(rows=microbatches[0].rows, run=run)])
    for theirs, ours in zip(base.logprobs, adapted.logprobs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5 if dtype is torch.float32 else 0.02, atol=0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_magnitudes_are_trained(engine: Engine, config: AdapterConfig) -> None:
    run = engine.create_run(config, seed=0)
    m = run.adapter.layout.range_of("m")
    before = run.adapter.flat[m].clone()
    rows = build(LOADS["one job"], engine)[0].rows
    for _ in range(3):
        engine.forward_backward([Microbatch(rows=rows, run=run)])
        engine.optim_step(run, learning_rate=1e-2)
    assert (run.adapter.flat[m] != before).double().mean() > 0.9
