"""The five operations: what they share, and what each says of itself."""

import gc
from typing import Any

import numpy as np
import pytest
import torch

from engine.adapter import Weights
from engine.config import AdapterConfig
from engine.engine import Engine
from engine.experts import Experts
from engine.run import Microbatch, Row
from engine.segments import Segment
from server.daemon.program import Cursor, JobProgram
from server.tokens import TokenRow, TokenRows
from tests.engine.client import train_by_hand
from tests.engine.gangs import fingerprint
from tests.engine.loads import LOADS, build, lora, mixlora, random_row, shake
from tests.models import VOCABULARY, tiny_base

TRAINING: dict[str, Any] = {
    "batch_size": 5,
    "learning_rate": 0.01,
    "loraplus_ratio": 1.0,
    "schedule": "linear",
    "warmup_steps": 2,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "microbatch_tokens": 40,
    "seed": 7,
    "evaluate_every": 3,
    "checkpoint_every": 100,
    "total_steps": 7,
}


def token_rows(num_rows: int, seed: int) -> TokenRows:
    draw = np.random.default_rng(seed)
    rows = []
    for length in draw.integers(4, 20, size=num_rows):
        start = int(draw.integers(1, length))
        rows.append(TokenRow(draw.integers(0, VOCABULARY, length).tolist(), [n >= start for n in range(length)]))
    return TokenRows.of(rows)


@pytest.mark.parametrize("config", [lora(), mixlora()], ids=["LoRA", "MixLoRA"])
def test_a_client_of_twenty_lines_gets_the_adapter_of_a_job(engine: Engine, config: AdapterConfig) -> None:
    """The job's program is driven as the daemon drives it, with evaluations, beside another job's."""
    train = token_rows(17, seed=0)
    programs = [
        JobProgram(TRAINING, train, token_rows(4, seed=1), Cursor()),
        JobProgram(TRAINING | {"total_steps": 11, "batch_size": 3}, token_rows(9, seed=2), None, Cursor()),
    ]
    runs = [engine.create_run(config, TRAINING["seed"]), engine.create_run(mixlora(2, 3, 1), seed=1)]
    while not all(program.is_finished for program in programs):
        for trains, do in ((True, engine.forward_backward), (False, engine.forward)):
            riding = [
                (program, [work for work in program.offered() if work.is_training is trains], run)
                for program, run in zip(programs, runs, strict=True)
            ]
            microbatches = [program.microbatch(work, run) for program, works, run in riding for work in works]
            outcomes = iter(do(microbatches) if microbatches else [])
            for program, works, _ in riding:
                program.took(works, [next(outcomes) for _ in works])
        for program, run in zip(programs, runs, strict=True):
            if program.unit_is_done:
                program.end_evaluation() if program.cursor.evaluating else program.end_step(engine, run)
    assert fingerprint(runs[0]) == fingerprint(train_by_hand(engine, config, TRAINING, train))


def test_the_same_seed_starts_with_the_same_weights_and_another_with_others(engine: Engine) -> None:
    flats = [engine.create_run(mixlora(), seed=seed).adapter.flat for seed in (0, 0, 1)]
    assert torch.equal(flats[0], flats[1])
    assert not torch.equal(flats[0], flats[2])


def test_a_fresh_adapter_has_the_papers_start(engine: Engine) -> None:
    """A ~ Kaiming-uniform(√5), B zero, the router normal with standard deviation 0.02."""
    named = dict(engine.create_run(mixlora(8, 16, 2), seed=0).adapter.named())
    for name, parameter in named.items():
        bound = parameter.shape[1] ** -0.5
        if name.endswith(".B"):
            assert not parameter.any()
        elif name.endswith(".A"):
            assert parameter.abs().max() <= bound
            assert float(parameter.std()) == pytest.approx(bound / 3**0.5, rel=0.2)
        else:
            assert float(parameter.std()) == pytest.approx(0.02, rel=0.2)
    assert not torch.equal(named["0.gate_proj.0.A"], named["0.gate_proj.1.A"])


def test_a_fresh_adapter_changes_nothing(engine: Engine) -> None:
    rows = [random_row(20, np.random.default_rng(0))]
    configs = [lora(), mixlora(), mixlora(4, 8, 8)]
    base, *others = engine.forward(
        [Microbatch(rows=rows), *(Microbatch(rows=rows, run=engine.create_run(c, seed=0)) for c in configs)]
    )
    for other in others:
        torch.testing.assert_close(other.logprobs[0], base.logprobs[0], rtol=1e-5, atol=1e-5)


def test_forward_takes_a_run_or_an_adapter_and_changes_neither(engine: Engine) -> None:
    run = engine.create_run(mixlora(), seed=0)
    shake(run, 0)
    before = run.adapter.flat.clone()
    rows = [random_row(20, np.random.default_rng(0))]
    outcomes = engine.forward([Microbatch(rows=rows, run=run), Microbatch(rows=rows, adapter=run.adapter)])
    assert torch.equal(outcomes[0].logprobs[0], outcomes[1].logprobs[0])
    assert torch.equal(run.adapter.flat, before)
    assert not run.gradient.any()
    assert (run.step, run.microbatch) == (0, 0)


def test_an_outcome_says_what_the_pass_came_to(engine: Engine) -> None:
    run = engine.create_run(mixlora(4, 6, 2), seed=0)
    draw = np.random.default_rng(0)
    rows = [random_row(12, draw), random_row(9, draw), Row(np.array([3]), np.array([], int), np.array([]))]
    trained, plain = engine.forward_backward(
        [Microbatch(rows=rows, run=run), Microbatch(rows=rows, run=engine.create_run(lora(), seed=1))]
    )
    assert [len(logprobs) for logprobs in trained.logprobs] == [len(row.targets) for row in rows]
    expected = sum(-float(row.weights @ lp.numpy()) for row, lp in zip(rows, trained.logprobs, strict=True))
    assert trained.loss == pytest.approx(expected, rel=1e-5)
    assert trained.expert_loads.shape == (2, 6)
    assert trained.expert_loads.sum(1).tolist() == [2 * 22] * 2, "every token takes two experts, in every layer"
    assert (plain.aux_loss, plain.expert_loads) == (None, None)


def test_a_balanced_router_costs_top_k_times_its_coefficient(engine: Engine) -> None:
    """All K slots count, as in the authors' code (the paper's eq. 9 writes argmax)."""
    run = engine.create_run(mixlora(2, 4, 4, router_aux_loss_coef=0.01), seed=0)
    (outcome,) = engine.forward([Microbatch(rows=[random_row(30, np.random.default_rng(0))], run=run)])
    assert outcome.aux_loss == pytest.approx(4 * 0.01, rel=1e-5)


def test_a_run_counts_its_microbatches_and_its_steps(engine: Engine) -> None:
    run = engine.create_run(lora(), seed=0)
    microbatch = Microbatch(rows=[random_row(9, np.random.default_rng(0))], run=run)
    engine.forward_backward([microbatch, microbatch])
    engine.forward_backward([microbatch])
    assert (run.step, run.microbatch) == (0, 3)
    norm = engine.optim_step(run, learning_rate=0.01)
    assert (run.step, run.microbatch) == (1, 0)
    assert norm > 0
    assert not run.gradient.any()


def test_a_run_weighs_its_parameters_gradient_and_moments(engine: Engine) -> None:
    run = engine.create_run(lora(), seed=0)
    assert run.bytes == 4 * 4 * run.adapter.layout.size


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", ["four different", "DoRA beside MixDoRA and MixLoRA"])
def test_a_pass_leaves_nothing_in_memory(name: str, recompute: bool) -> None:
    """Not even until the next garbage collection: activations are the largest thing there is."""

    def kept() -> int:
        return sum(isinstance(thing, Experts | Segment | Weights) for thing in gc.get_objects())

    engine = Engine(tiny_base(recompute=recompute))
    microbatches = build(LOADS[name], engine)
    gc.collect()
    before = kept()
    gc.disable()
    try:
        engine.forward_backward(microbatches)
        assert kept() == before
    finally:
        gc.enable()
