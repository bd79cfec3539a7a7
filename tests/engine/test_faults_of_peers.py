"""What other multi-adapter trainers get wrong, each by its number in the list of their faults; ours must not.

1 padding and prompts in the loss; 2 dropout while applying; 3 a backward without the dropout's mask; 4 parameters
that are not saved; 5 accumulation that is not averaged; 6 no end-of-text, no warm-up, one order for all epochs;
8 an adapter is published only when all jobs have ended, and none can join. (7, one bad job ends all, is
`test_invariance`'s NaN and the server's.)
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.config import AdapterConfig
from engine.engine import Engine
from engine.run import Microbatch, Row, Run
from engine.sampling import Sample, advance
from server import curriculum
from server.daemon.program import Cursor, JobProgram, StepReport
from server.render import Renderer
from server.tokens import TokenRow, TokenRows
from tests.engine.loads import lora, mixlora, random_row, shake
from tests.engine.others import our_logprobs, publish
from tests.models import VOCABULARY, tiny_model
from tests.tiny import write_tiny_tokenizer

TRAINING: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 8,
    "learning_rate": 0.01,
    "loraplus_ratio": 1.0,
    "schedule": "linear",
    "warmup_steps": 3,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "microbatch_tokens": 64,
    "seed": 42,
    "evaluate_every": None,
    "checkpoint_every": 100,
    "total_steps": 8,
}


def token_rows(num_rows: int, longest: int = 20) -> TokenRows:
    """Rows whose second half is supervised."""
    draw = np.random.default_rng(num_rows)
    rows = []
    for length in draw.integers(4, longest, size=num_rows):
        tokens = draw.integers(0, VOCABULARY, length).tolist()
        rows.append(TokenRow(tokens, [place >= length // 2 for place in range(length)]))
    return TokenRows.of(rows)


def drive(engine: Engine, run: Run, program: JobProgram) -> Iterator[StepReport]:
    """A job to its end, one microbatch a pass; the gradient of a step is the run's when its report comes."""
    while not program.is_finished:
        works = program.offered()
        for work in works:
            program.took([work], engine.forward_backward([program.microbatch(work, run)]))
        yield program.end_step(engine, run)


def test_fault_1_the_loss_counts_neither_prompts_nor_padding_nor_neighbours(engine: Engine) -> None:
    rows = token_rows(1)
    tokens, targets = rows.row(0)
    labels = torch.full((1, len(tokens)), -100)
    labels[0, targets] = torch.from_numpy(tokens[targets]).long()
    model, ids = tiny_model(), torch.from_numpy(tokens).long()[None]
    theirs, with_prompt = (float(model(input_ids=ids, labels=wanted).loss) for wanted in (labels, ids))
    run, longer = engine.create_run(lora(), seed=0), engine.create_run(mixlora(), seed=1)
    program = JobProgram(TRAINING | {"total_steps": 1}, rows, None, Cursor())
    (work,) = program.offered()
    (alone,) = engine.forward_backward([program.microbatch(work, run)])
    run.microbatch = 0
    neighbour = Microbatch(rows=[random_row(90, np.random.default_rng(0))], run=longer)
    beside, _ = engine.forward_backward([program.microbatch(work, run), neighbour])
    assert alone.loss == beside.loss == pytest.approx(theirs, rel=1e-6)
    assert abs(alone.loss - with_prompt) > 0.01


@pytest.mark.parametrize("config", [lora(dropout=0.5), mixlora(dropout=0.5)], ids=["LoRA", "MixLoRA"])
def test_fault_2_dropout_is_for_training_alone(engine: Engine, config: AdapterConfig) -> None:
    run = engine.create_run(config, seed=0)
    shake(run, 0)
    first, again = our_logprobs(engine, run), our_logprobs(engine, run)
    samples = [Sample([5, 17, 300], max_tokens=8, adapter=run.adapter) for _ in range(2)]
    for sample in samples:
        advance(engine.base, [sample], 8)
    assert all(map(torch.equal, first, again))
    assert samples[0].logprobs == samples[1].logprobs
    row = random_row(12, np.random.default_rng(0))
    in_training = [engine.forward_backward([Microbatch(rows=[row], run=run)])[0].loss for _ in range(2)]
    assert in_training[0] != in_training[1]


def objective(engine: Engine, run: Run, row: Row, flat: Tensor) -> float:
    """What the gradient is of: at the same place of the random sequence, with its dropout."""
    run.adapter.flat.copy_(flat)
    run.microbatch = 0
    (outcome,) = engine.forward_backward([Microbatch(rows=[row], run=run)])
    return outcome.loss + (outcome.aux_loss or 0.0)


GRADIENTS = {
    f"{matrix} of {name}": (config, matrix)
    for name, config in {
        "LoRA": lora(dropout=0.3),
        "MixLoRA": mixlora(dropout=0.3),
        "MixLoRA with all experts": mixlora(4, 6, 6, dropout=0.05),
    }.items()
    for matrix in (["A", "B", "weight"] if config.is_mixture else ["A", "B"])
}


@pytest.mark.parametrize(("config", "matrix"), GRADIENTS.values(), ids=GRADIENTS)
def test_fault_3_gradients_are_finite_differences_with_dropout(
    precise_engine: Engine, config: AdapterConfig, matrix: str
) -> None:
    """Along random directions of all A, of all B, of all routers' weights."""
    run = precise_engine.create_run(config, seed=0)
    shake(run, 0)
    row, flat = random_row(30, np.random.default_rng(1)), run.adapter.flat.clone()
    run.gradient.zero_()
    objective(precise_engine, run, row, flat)
    gradient = run.gradient.clone()
    slots = [slot for slot in run.adapter.layout.slots.values() if slot.matrix == matrix]
    for seed in range(3):
        direction = torch.zeros_like(flat)
        draw = torch.Generator().manual_seed(seed)
        for slot in slots:
            direction[slot.start : slot.stop] = torch.randn(slot.stop - slot.start, generator=draw, dtype=flat.dtype)
        step = 1e-5 * direction / direction.norm()
        up, down = (objective(precise_engine, run, row, flat + sign * step) for sign in (1, -1))
        assert (up - down) / 2 == pytest.approx(float(gradient @ step), rel=1e-6)


@pytest.mark.parametrize(
    "config",
    [lora(), mixlora(), lora(dora=True), mixlora(dora=True)],
    ids=["LoRA", "MixLoRA", "DoRA", "MixDoRA"],
)
def test_fault_4_all_that_is_trained_is_saved(engine: Engine, config: AdapterConfig, tmp_path: Path) -> None:
    run = engine.create_run(config, seed=0)
    before = run.adapter.flat.clone()
    rows = [random_row(30, np.random.default_rng(seed)) for seed in range(4)]
    for _ in range(3):
        engine.forward_backward([Microbatch(rows=rows, run=run)])
        engine.optim_step(run, learning_rate=0.01)
    for slot in run.adapter.layout.slots.values():
        assert not torch.equal(before[slot.start : slot.stop], run.adapter.flat[slot.start : slot.stop]), slot.name
    reloaded = engine.load_adapter(publish(engine, run, tmp_path))
    assert torch.equal(reloaded.flat, run.adapter.flat)


@pytest.mark.parametrize(
    "config", [lora(dropout=0.0), mixlora(dropout=0.0, router_aux_loss_coef=0.0)], ids=["LoRA", "MixLoRA"]
)
def test_fault_5_a_step_of_small_microbatches_is_a_step_of_one_large_one(
    precise_engine: Engine, config: AdapterConfig
) -> None:
    """The auxiliary loss is a microbatch's own, so it is left out here."""
    gradients, cuts = [], []
    for cap in (24, 1000):
        run = precise_engine.create_run(config, seed=0)
        shake(run, 0)
        program = JobProgram(TRAINING | {"microbatch_tokens": cap}, token_rows(8), None, Cursor())
        for work in program.offered():
            precise_engine.forward_backward([program.microbatch(work, run)])
        gradients.append(run.gradient.clone())
        cuts.append(len(program.offered()))
    assert cuts[0] >= 4
    assert cuts[1] == 1
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-13)


def test_fault_5_an_epoch_takes_one_optimizer_step_a_batch_the_last_one_too(engine: Engine) -> None:
    run = engine.create_run(lora(), seed=0)
    program = JobProgram(TRAINING, token_rows(26), None, Cursor())
    reports = list(drive(engine, run, program))
    assert [report.step for report in reports] == list(range(1, 9))
    assert [report.epoch for report in reports] == [n / 4 for n in range(1, 9)]
    assert run.step == 8
    assert reports[3].tokens == token_rows(26).lengths.sum() == reports[7].tokens / 2


@pytest.mark.parametrize("template", [True, False], ids=["chat template", "no template"])
def test_fault_6_the_end_of_an_answer_is_supervised(tmp_path: Path, template: bool) -> None:
    tokenizer = write_tiny_tokenizer(tmp_path, template)
    row = Renderer(tmp_path).training({"prompt": "one?", "completion": "two"}, supervise="completion")
    end = tokenizer.token_to_id("<|im_end|>" if template else "<|endoftext|>")
    assert (row.tokens[-1], row.supervised[-1]) == (end, True)
    _, targets = TokenRows.of([row]).row(0)
    assert targets[-1] == len(row.tokens) - 1


def test_fault_6_warm_up_reaches_the_optimizer(engine: Engine) -> None:
    """B is zero at the start, and Adam's first step moves it by the rate itself."""
    moves = {}
    for warmup_steps in (0, 3):
        run = engine.create_run(lora(dropout=0.0), seed=0)
        program = JobProgram(TRAINING | {"warmup_steps": warmup_steps}, token_rows(26), None, Cursor())
        before = run.adapter.flat.clone()
        next(drive(engine, run, program))
        moves[warmup_steps] = float((run.adapter.flat - before).abs().max())
    assert moves[0] == pytest.approx(0.01, rel=1e-3)
    assert moves[3] == pytest.approx(0.01 / 3, rel=1e-3)


def test_fault_6_every_epoch_has_its_own_order_of_all_rows() -> None:
    epochs = [
        np.concatenate(
            [
                curriculum.rows_of_step(s, mixture=curriculum.Mixture.single(26), batch_size=8, seed=42)
                for s in range(4 * e, 4 * e + 4)
            ]
        )
        for e in range(3)
    ]
    assert all(sorted(epoch) == list(range(26)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_fault_8_an_adapter_is_published_and_a_job_joins_while_others_train(engine: Engine, tmp_path: Path) -> None:
    long, short = engine.create_run(mixlora(), seed=0), engine.create_run(lora(), seed=1)
    rows = [random_row(20, np.random.default_rng(0))]

    def learn(*runs: Run) -> None:
        engine.forward_backward([Microbatch(rows=rows, run=run) for run in runs])
        for run in runs:
            engine.optim_step(run, learning_rate=0.01)

    learn(long, short)
    done = engine.load_adapter(publish(engine, short, tmp_path))
    assert torch.equal(done.flat, short.adapter.flat)
    learn(long, engine.create_run(lora(8), seed=2))
    assert torch.equal(done.flat, short.adapter.flat)
    assert long.step == 2
