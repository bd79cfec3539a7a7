"""The paper's table from one command; the baselines in it do what our engine does, only otherwise."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.baselines import feed_forwards, looped
from benchmarks.bases import Bases
from benchmarks.contenders import require_same_loss
from benchmarks.data import make_steps
from benchmarks.paper import COLUMNS, ROWS, Contender, main
from benchmarks.published import TABLES
from engine.config import AdapterConfig
from engine.engine import Engine
from engine.run import Microbatch, Row, Run
from tests.models import tiny_base

CONFIG = AdapterConfig(
    method="mixlora",
    rank=4,
    alpha=8.0,
    dropout=0.2,
    target_modules=("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"),
    num_experts=4,
    top_k=2,
    router_aux_loss_coef=0.1,
)


def rows_of(seed: int, lengths: list[int]) -> list[Row]:
    draw = np.random.default_rng(seed)
    return [Row(draw.integers(0, 500, n), np.arange(1, n), draw.random(n - 1)) for n in lengths]


def trained_run(engine: Engine, seed: int) -> Run:
    """Every parameter is drawn: a B of zeros would hide what the experts do."""
    run = engine.create_run(CONFIG, seed)
    run.adapter.flat.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
    return run


def losses_and_gradients(engine: Engine, runs: list[Run]) -> tuple[list[tuple[float, float | None]], list[Tensor]]:
    jobs = [
        Microbatch(rows=rows_of(seed, lengths), run=run, auxiliary_weight=0.5)
        for seed, (run, lengths) in enumerate(zip(runs, ([13, 7], [21]), strict=True))
    ]
    outcomes = engine.forward_backward(jobs)
    gradients = [run.gradient.clone() for run in runs]
    for run in runs:
        run.discard_gradient()
    return [(outcome.loss, outcome.aux_loss) for outcome in outcomes], gradients


@pytest.mark.parametrize("shares_projections", [False, True])
def test_a_baseline_has_the_engines_losses_and_gradients(shares_projections: bool):
    base = tiny_base(dtype=torch.float64)
    engine = Engine(base)
    runs = [trained_run(engine, seed) for seed in range(2)]
    losses, gradients = losses_and_gradients(engine, runs)
    with feed_forwards(base, looped(base, shares_projections=shares_projections)):
        baseline_losses, baseline_gradients = losses_and_gradients(engine, runs)
    assert np.array(baseline_losses) == pytest.approx(np.array(losses), rel=1e-9)
    torch.testing.assert_close(baseline_gradients, gradients)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    again, _ = losses_and_gradients(engine, runs)
    assert again == losses  # the engine's own feed-forward is back


def test_every_row_of_the_table_starts_from_the_same_loss_and_trains(base_folder: Path):
    bases = Bases(base_folder, "float32", "cpu", jobs=2, jobs_a_pass=2)
    (step,) = make_steps(bases.packed, bases.folder, [], jobs=2, batch=2, rows=4)
    first_losses = []
    for name, models in ROWS:
        contender = Contender(replace(bases), name, models)
        losses = [contender.train(step)[0] for _ in range(8)]
        assert losses[-1] < losses[0]
        assert contender.infer(step) > 0
        first_losses.append(losses[0])
    require_same_loss(first_losses, "float32")


@pytest.mark.slow
def test_one_command_gives_the_table_and_its_chart(base_folder: Path, tmp_path: Path):
    pytest.importorskip("matplotlib")
    report_file, chart = tmp_path / "table.json", tmp_path / "docs" / "table.png"
    options = ["--base", str(base_folder), "--dtype", "float32", "--batch", "2", "--rounds", "2"]
    assert main([*options, "--table", "6", "--json", str(report_file), "--chart", str(chart)]) == 0
    assert chart.read_bytes().startswith(b"\x89PNG")

    rows = json.loads(report_file.read_text())["rows"]
    assert [(row["contender"], row["models"]) for row in rows] == ROWS
    losses = [row["first_loss"] for row in rows]
    assert max(losses) == pytest.approx(min(losses), rel=1e-5)
    for row in rows:
        assert all(row["here"][column] > 0 for column in COLUMNS)
        assert len(row["turns"]) == 2
    assert set(rows[0]["here_to_lora"].values()) == {1.0}
    published = {(row["contender"], row["models"]) for row in rows if row["published"]}
    assert published == TABLES[6].rows.keys()


@pytest.mark.parametrize(
    ("table", "row", "column", "percent"),
    [
        (6, ("dora", 1), "forward", 268.8),
        (6, ("mixlora_unshared", 1), "backward", 215.0),
        (6, ("mixlora_w1_w3", 1), "inference", 183.2),
        (6, ("mixlora_unshared", 2), "forward", 217.7),
        (6, ("mixlora_w1_w3", 2), "training_memory", 57.7),
        (7, ("dora", 1), "inference", 350.9),
        (7, ("mixlora_unshared", 1), "forward", 165.8),
        (7, ("mixlora_w1_w3", 1), "backward", 170.4),
        (7, ("mixlora_unshared", 2), "inference_memory", 61.5),
        (7, ("mixlora_w1_w3", 2), "forward", 148.1),
    ],
)
def test_the_published_figures_give_the_published_percentages(
    table: int, row: tuple[str, int], column: str, percent: float
):
    """The paper prints both, so a figure that was copied wrongly shows. It rounds memory to 0.1 GB."""
    rows = TABLES[table].rows
    ratio = getattr(rows[row], column) / getattr(rows["lora", 1], column)
    assert 100 * ratio == pytest.approx(percent, abs=0.4)
