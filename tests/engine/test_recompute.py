"""With `recompute` a pass keeps less and gives the same bits (docs/design.md §3)."""

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engine.engine import Engine
from engine.families import FAMILIES
from engine.run import Microbatch
from tests.engine.loads import LOADS, build
from tests.models import tiny_base


@functools.cache
def engine_of(dtype: torch.dtype, recompute: bool) -> Engine:
    return Engine(tiny_base(dtype=dtype, recompute=recompute))


def train(engine: Engine, name: str) -> tuple[list[object], list[torch.Tensor]]:
    """What a pass says of each microbatch, and each run's gradient."""
    microbatches: list[Microbatch] = build(LOADS[name], engine)
    outcomes = engine.forward_backward(microbatches)
    said = [
        (
            torch.cat(o.logprobs).tolist(),
            o.loss,
            o.aux_loss,
            None if o.expert_loads is None else o.expert_loads.tolist(),
        )
        for o in outcomes
    ]
    return said, [m.run.gradient for m in microbatches if m.run]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOADS)
def test_losses_and_gradients_have_the_same_bits(name: str, dtype: torch.dtype) -> None:
    (said, gradients), (again, recomputed) = (train(engine_of(dtype, recompute), name) for recompute in (False, True))
    assert said == again
    assert gradients[0].any()
    assert all(map(torch.equal, gradients, recomputed))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_can_recompute(model_type: str) -> None:
    (said, gradients), (again, recomputed) = (
        train(Engine(tiny_base(model_type, recompute=recompute)), "two segments of one job")
        for recompute in (False, True)
    )
    assert said == again
    assert all(map(torch.equal, gradients, recomputed))


def test_a_backward_may_have_a_thread_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    expected = train(engine_of(torch.float32, True), "LoRA beside MixLoRA")
    backward = torch.autograd.backward

    def elsewhere(*arguments: object) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(backward, *arguments).result()

    monkeypatch.setattr(torch.autograd, "backward", elsewhere)
    said, gradients = train(engine_of(torch.float32, True), "LoRA beside MixLoRA")
    assert said == expected[0]
    assert all(map(torch.equal, gradients, expected[1]))
