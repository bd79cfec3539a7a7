"""A run that starts from an adapter's files."""

from pathlib import Path

import numpy as np
import pytest
import torch

from engine import formats
from engine.config import AdapterConfig
from engine.engine import Engine
from engine.errors import EngineError
from engine.run import Microbatch
from tests.engine.loads import lora, mixlora, random_row, shake
from tests.engine.others import publish

CONFIGS = {
    "LoRA": lora(),
    "DoRA": lora(dora=True),
    "MixLoRA": mixlora(),
    "MixDoRA, rsLoRA": mixlora(2, 3, 2, dora=True, rslora=True),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_run_has_the_log_probs_of_the_adapter_that_it_starts_from_and_a_fresh_optimizer(
    config: AdapterConfig, engine: Engine, tmp_path: Path
) -> None:
    first = engine.create_run(config, seed=3)
    shake(first, 3)
    publish(engine, first, tmp_path)
    run = engine.create_run(config, 42, tmp_path)
    row = random_row(20, np.random.default_rng(0))
    adapters = (engine.load_adapter(tmp_path), run.adapter, engine.create_run(config, 42).adapter)
    outcomes = engine.forward([Microbatch(rows=[row], adapter=adapter) for adapter in adapters])
    published, started, fresh = (outcome.logprobs[0] for outcome in outcomes)
    assert torch.equal(started, published)
    assert not torch.equal(fresh, published)
    assert torch.equal(run.adapter.flat, first.adapter.flat)
    assert (run.step, run.microbatch, run.seed) == (0, 0, 42)
    assert not any(tensor.any() for tensor in (run.gradient, run.optimizer.first, run.optimizer.second))


def test_weights_of_another_shape_are_no_start(engine: Engine, tmp_path: Path) -> None:
    publish(engine, engine.create_run(lora(4), seed=0), tmp_path)
    for config in (lora(8), lora(4, dora=True), mixlora()):
        with pytest.raises(EngineError, match="missing or has another shape"):
            engine.create_run(config, 0, tmp_path)
    assert formats.WEIGHTS in {path.name for path in tmp_path.iterdir()}
