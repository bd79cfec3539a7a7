"""Losses are sums, linear in their weights, and the head runs in chunks on rows that have a target."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.engine import Engine
from engine.errors import EngineError
from engine.loss import CHUNK_ROWS
from engine.run import Microbatch, Outcome, Row, Run
from tests.engine.loads import lora, mixlora, shake
from tests.models import VOCABULARY

CONFIGS = {"LoRA": lora(dropout=0.0), "MixLoRA": mixlora(dropout=0.0)}


def row(length: int, weights: np.ndarray | None = None, seed: int = 0) -> Row:
    """A row with every token but the first as a target."""
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, length)
    return Row(tokens, np.arange(1, length), np.ones(length - 1) if weights is None else weights)


def learn(engine: Engine, run: Run, *rows: Row, auxiliary_weight: float = 0.0) -> tuple[Outcome, Tensor]:
    """One pass over one microbatch: its outcome and the gradient that it gave."""
    run.gradient.zero_()
    (outcome,) = engine.forward_backward([Microbatch(rows=list(rows), run=run, auxiliary_weight=auxiliary_weight)])
    return outcome, run.gradient.clone()


@pytest.fixture(params=CONFIGS)
def run(request: pytest.FixtureRequest, precise_engine: Engine) -> Run:
    run = precise_engine.create_run(CONFIGS[request.param], seed=0)
    shake(run, 0)
    return run


def test_the_gradient_of_the_negated_weights_is_the_exact_negative(precise_engine: Engine, run: Run) -> None:
    weights = np.random.default_rng(1).normal(size=19)
    plus, gradient = learn(precise_engine, run, row(20, weights))
    minus, negative = learn(precise_engine, run, row(20, -weights))
    assert gradient.abs().max() > 0
    assert torch.equal(gradient, -negative)
    assert plus.loss == -minus.loss
    assert torch.equal(plus.logprobs[0], minus.logprobs[0])


def test_a_target_of_weight_zero_gives_its_logprob_and_no_gradient(precise_engine: Engine, run: Run) -> None:
    full = row(20)
    weights = np.where(np.arange(19) % 3 == 0, 0.0, 1.5)
    kept = weights != 0
    all_of_it, _ = learn(precise_engine, run, full)
    zeroed, gradient = learn(precise_engine, run, Row(full.tokens, full.targets, weights))
    _, expected = learn(precise_engine, run, Row(full.tokens, full.targets[kept], weights[kept]))
    assert torch.equal(zeroed.logprobs[0], all_of_it.logprobs[0])
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


def test_weights_that_are_all_zero_give_logprobs_and_a_gradient_of_zero(precise_engine: Engine, run: Run) -> None:
    outcome, gradient = learn(precise_engine, run, row(20, np.zeros(19)))
    assert (outcome.loss, gradient.abs().max().item()) == (0, 0)
    assert (outcome.logprobs[0] < 0).all()


def test_a_pass_without_any_target_has_a_loss_of_zero_and_the_auxiliary_gradient(precise_engine: Engine) -> None:
    one_token = Row(np.array([3]), np.array([], int), np.array([]))
    for config in CONFIGS.values():
        outcome, gradient = learn(precise_engine, precise_engine.create_run(config, 0), one_token, auxiliary_weight=1.0)
        assert (outcome.loss, len(outcome.logprobs[0])) == (0, 0)
        assert bool(gradient.any()) is config.is_mixture


def test_the_gradients_of_two_weightings_add_up_to_that_of_their_sum(precise_engine: Engine, run: Run) -> None:
    first, second = np.random.default_rng(2).normal(size=(2, 19))
    _, one = learn(precise_engine, run, row(20, first))
    _, other = learn(precise_engine, run, row(20, second))
    _, both = learn(precise_engine, run, row(20, first + second))
    torch.testing.assert_close(one + other, both, rtol=1e-11, atol=1e-13)


def test_passes_accumulate_their_gradients_until_the_optimizer_step(precise_engine: Engine, run: Run) -> None:
    rows = [row(8, seed=seed) for seed in range(3)]
    _, together = learn(precise_engine, run, *rows)
    run.gradient.zero_()
    for one in rows:
        precise_engine.forward_backward([Microbatch(rows=[one], run=run, auxiliary_weight=0.0)])
    torch.testing.assert_close(run.gradient, together, rtol=1e-11, atol=1e-13)
    precise_engine.optim_step(run, learning_rate=0.1)
    assert run.gradient.abs().max() == 0


def test_the_auxiliary_loss_is_weighed_and_added(precise_engine: Engine) -> None:
    run = precise_engine.create_run(CONFIGS["MixLoRA"], seed=0)
    shake(run, 0)
    gradients = [learn(precise_engine, run, row(20), auxiliary_weight=weight)[1] for weight in (0.0, 1.0, 2.0)]
    assert (gradients[1] - gradients[0]).abs().max() > 1e-6
    torch.testing.assert_close(gradients[2] - gradients[1], gradients[1] - gradients[0], rtol=1e-8, atol=1e-12)


def test_a_loss_of_an_unknown_name_is_refused(engine: Engine) -> None:
    run = engine.create_run(lora(), seed=0)
    with pytest.raises(EngineError, match=r"unknown loss \['hinge'\]; take one of cross_entropy"):
        engine.forward_backward([Microbatch(rows=[row(4)], run=run, loss="hinge")])


def test_the_size_of_the_heads_chunks_changes_no_bit(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    run = engine.create_run(mixlora(), seed=0)
    shake(run, 0)
    results = []
    for chunk_rows in (16, 48, 4096):
        monkeypatch.setattr("engine.loss.CHUNK_ROWS", chunk_rows)
        run.microbatch = 0
        outcome, gradient = learn(engine, run, row(100), row(57, seed=1))
        results.append((torch.cat(outcome.logprobs), gradient))
    for logprobs, gradient in results[1:]:
        assert torch.equal(logprobs, results[0][0])
        assert torch.equal(gradient, results[0][1])


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that comes to be."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.fixture
def head_rows(engine: Engine) -> Iterator[list[int]]:
    """How many rows the head was given, each time."""
    seen: list[int] = []
    hook = engine.base.model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    yield seen
    hook.remove()


def test_the_logits_of_a_whole_pack_are_never_in_memory(engine: Engine, head_rows: list[int]) -> None:
    run = engine.create_run(lora(), seed=0)
    rows = [row(100, seed=seed) for seed in range(6)]
    with LargestTensor() as largest:
        engine.forward_backward([Microbatch(rows=rows, run=run)])
    assert len(head_rows) == 3
    assert max(head_rows) == CHUNK_ROWS
    assert largest.elements == CHUNK_ROWS * VOCABULARY < 600 * VOCABULARY


def test_the_head_runs_only_on_rows_that_have_a_target(engine: Engine, head_rows: list[int]) -> None:
    rows = [Row(np.arange(90), np.array([88, 89]), np.ones(2)), Row(np.arange(70), np.array([69]), np.ones(1))]
    engine.forward([Microbatch(rows=rows)])
    assert head_rows == [16]
