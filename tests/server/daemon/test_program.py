"""A job as a program: which rows, which weights, what comes next. Driven over the real engine."""

from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch

from engine.base_model import BaseModel
from engine.config import AdapterConfig
from engine.engine import Engine
from engine.run import Microbatch, Row, Run
from server import curriculum
from server.daemon.program import Cursor, Diverged, JobProgram
from server.tokens import TokenRow, TokenRows

MIXTURE = AdapterConfig(
    method="mixlora",
    rank=4,
    alpha=8,
    dropout=0.1,
    target_modules=("q_proj", "gate_proj", "up_proj", "down_proj"),
    num_experts=4,
    top_k=2,
    router_aux_loss_coef=0.01,
)
TRAINING: dict[str, Any] = {
    "batch_size": 4,
    "learning_rate": 1e-3,
    "loraplus_ratio": 1.0,
    "schedule": "linear",
    "warmup_steps": 1,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "microbatch_tokens": 40,
    "seed": 42,
    "evaluate_every": 3,
    "checkpoint_every": 2,
    "total_steps": 8,
}


def token_rows(count: int, seed: int) -> TokenRows:
    """Rows of 5 to 19 tokens; the second half of each is learned."""
    chance = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length = int(chance.integers(5, 20))
        rows.append(
            TokenRow(chance.integers(3, 200, length).tolist(), [index >= length // 2 for index in range(length)])
        )
    return TokenRows.of(rows)


TRAIN, VALID = token_rows(10, 1), token_rows(6, 2)


@pytest.fixture
def engine(frozen: BaseModel) -> Engine:
    return Engine(frozen)


@pytest.fixture
def run(engine: Engine) -> Run:
    return engine.create_run(MIXTURE, 42)


def new_program(cursor: Cursor = Cursor(), valid: TokenRows | None = VALID, **changes: Any) -> JobProgram:
    return JobProgram({**TRAINING, **changes}, TRAIN, valid, cursor)


def microbatches(program: JobProgram, run: Run) -> list[Microbatch]:
    return [program.microbatch(work, run) for work in program.offered()]


def do_unit(program: JobProgram, engine: Engine, run: Run) -> float:
    """All microbatches of the unit under way, one a pass, and its end; its loss."""
    while not program.unit_is_done:
        works = program.offered()[:1]
        do = engine.forward_backward if works[0].is_training else engine.forward
        program.took(works, do([program.microbatch(works[0], run)]))
    if program.cursor.evaluating:
        return program.end_evaluation().valid_loss
    return program.end_step(engine, run).train_loss


def test_the_weights_of_a_step_sum_to_one_over_all_its_microbatches(run: Run) -> None:
    program = new_program()
    parts = microbatches(program, run)
    assert len(parts) > 1
    weights = np.concatenate([row.weights for part in parts for row in part.rows])
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert len(set(weights)) == 1, "each token weighs the same, whichever microbatch it is in"
    assert sum(part.auxiliary_weight for part in parts) == pytest.approx(1, abs=1e-12)


def test_no_microbatch_is_larger_than_what_the_job_was_submitted_with(run: Run) -> None:
    for part in microbatches(new_program(), run):
        assert sum(len(row.tokens) for row in part.rows) <= TRAINING["microbatch_tokens"]


def test_each_epoch_takes_every_row_once_in_an_order_of_its_own() -> None:
    seen = [[index for work in new_program(Cursor(step)).offered() for index in work.rows] for step in range(6)]
    assert [len(rows) for rows in seen] == [4, 4, 2, 4, 4, 2]
    first, second = [*chain(*seen[:3])], [*chain(*seen[3:])]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_the_cursor_counts_steps_and_tokens_and_what_is_offered_hangs_on_it_alone(engine: Engine, run: Run) -> None:
    program = new_program(valid=None)
    for step in range(8):
        assert program.cursor.step == step
        assert program.offered() == new_program(program.cursor, valid=None).offered()
        do_unit(program, engine, run)
    assert program.is_finished
    assert program.offered() == []
    assert program.cursor.tokens == curriculum.tokens_of_steps(
        8, mixture=curriculum.Mixture.single(10), lengths=TRAIN.lengths, batch_size=4, seed=42
    )


def test_a_unit_under_way_is_no_place_to_save_at(engine: Engine, run: Run) -> None:
    program = new_program()
    assert program.at_boundary
    works = program.offered()
    program.took(works[:1], engine.forward_backward([program.microbatch(works[0], run)]))
    assert not program.at_boundary
    assert program.offered() == works[1:]
    program.took(works[1:], engine.forward_backward([program.microbatch(work, run) for work in works[1:]]))
    assert program.unit_is_done
    program.end_step(engine, run)
    assert program.at_boundary


def test_the_loss_of_a_step_does_not_hang_on_how_its_microbatches_were_spread_over_gangs(engine: Engine) -> None:
    losses = set()
    for size in (1, 2, 10):
        run, program = engine.create_run(MIXTURE, 42), new_program()
        while not program.unit_is_done:
            works = program.offered()[:size]
            program.took(works, engine.forward_backward([program.microbatch(work, run) for work in works]))
        report = program.end_step(engine, run)
        losses.add((report.train_loss, report.aux_loss, report.grad_norm, run.adapter.flat.sum().item()))
    assert len(losses) == 1


def test_evaluations_come_when_due_and_after_the_last_step(engine: Engine, run: Run) -> None:
    program, evaluated, checkpoints = new_program(), [], []
    while not program.is_finished:
        if program.cursor.evaluating:
            evaluated.append(program.cursor.step)
        do_unit(program, engine, run)
        if program.checkpoint_is_due():
            checkpoints.append(program.cursor.step)
    assert evaluated == [3, 6, 8]
    assert checkpoints == [2, 4, 6, 8], "of step 6 once, after its evaluation"


def test_without_rows_to_evaluate_on_nothing_is_evaluated(engine: Engine, run: Run) -> None:
    program = new_program(valid=None, evaluate_every=None)
    for _ in range(8):
        do_unit(program, engine, run)
    assert program.is_finished


def test_the_validation_loss_is_the_mean_over_all_supervised_tokens(engine: Engine, run: Run) -> None:
    program = new_program()
    while not program.cursor.evaluating:
        do_unit(program, engine, run)
    before = run.adapter.flat.clone()
    measured = do_unit(program, engine, run)
    nll, count = 0.0, 0
    for index in range(len(VALID)):
        tokens, targets = VALID.row(index)
        row = Row(tokens, targets, np.ones(len(targets)))
        (outcome,) = engine.forward([Microbatch(rows=[row], adapter=run.adapter)])
        nll -= float(outcome.logprobs[0].double().sum())
        count += len(targets)
    assert measured == pytest.approx(nll / count, rel=1e-5)
    assert (run.adapter.flat == before).all()
    assert not run.gradient.any()


def test_a_resumed_evaluation_comes_before_the_next_step() -> None:
    program = new_program(Cursor(step=3, tokens=100, evaluating=True))
    assert not any(work.is_training for work in program.offered())
    assert [index for work in program.offered() for index in work.rows] == list(range(len(VALID)))


def test_a_job_is_finished_only_when_its_last_evaluation_is_done(engine: Engine, run: Run) -> None:
    program = new_program(Cursor(step=8, tokens=100, evaluating=True))
    assert not program.is_finished
    do_unit(program, engine, run)
    assert program.is_finished


def test_loads_of_experts_are_kept_of_the_last_step_and_each_tenth_before_it_summed_over_the_microbatches(
    engine: Engine, run: Run
) -> None:
    program = new_program(valid=None, total_steps=11)
    kept = {}
    while not program.is_finished:
        works, slots = program.offered(), torch.zeros(2, 4, dtype=torch.int64)
        for work in works:
            outcomes = engine.forward_backward([program.microbatch(work, run)])
            slots += outcomes[0].expert_loads
            program.took([work], outcomes)
        report = program.end_step(engine, run)
        if report.expert_loads is not None:
            kept[report.step] = report.expert_loads
            assert len(works) > 1
            assert report.expert_loads == slots.tolist()
            assert slots.sum(1).tolist() == [report.step_tokens * 2] * 2, "each token has top_k = 2 slots in each layer"
    assert list(kept) == [1, 11]


def test_a_loss_that_is_no_number_is_named_by_its_microbatch_and_not_taken(engine: Engine, run: Run) -> None:
    program = new_program()
    works = program.offered()
    outcomes = engine.forward_backward([program.microbatch(work, run) for work in works])
    broken = [outcomes[0], replace(outcomes[1], loss=float("nan")), *outcomes[2:]]
    with pytest.raises(Diverged) as caught:
        program.took(works, broken)
    assert caught.value.works == [works[1]]
    assert program.at_boundary


def test_a_gradient_that_is_no_number_takes_no_step(engine: Engine, run: Run) -> None:
    program = new_program()
    do_unit(program, engine, run)
    works, cursor, weights = program.offered(), program.cursor, run.adapter.flat.clone()
    program.took(works, engine.forward_backward([program.microbatch(work, run) for work in works]))
    run.gradient[0] = float("inf")
    with pytest.raises(Diverged) as caught:
        program.end_step(engine, run)
    assert list(caught.value.works) == []
    assert (program.cursor, run.step) == (cursor, 1)
    assert torch.equal(run.adapter.flat, weights)
