"""The demo's bar means something: with completions that belong to other prompts it is not reached."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixloom import Client
from mixloom.demo.measure import Exam, accuracies
from mixloom.demo.tasks import TASKS, Row, majority_accuracy
from tests.e2e.server import Server
from tests.models import smollm2_folder

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]
TASK = TASKS["dates"]
BAR = 0.30
STEPS, BATCH = 10, 8
NUM_HELD_OUT = 50


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A tenant of a server with the real base, computing as fast as this machine can."""
    settings = {"dtype": "auto", "threads": 0, "recovery_steps": 0, "microbatch_tokens": 1024, "token_budget": 4096}
    server = Server(tmp_path_factory.mktemp("shuffled"), smollm2_folder(), **settings)
    try:
        yield server.start().tenant("alice")
    finally:
        server.end()


def submit(client: Client, rows: list[Row], path: Path) -> str:
    """The id of a job on these rows, much as the demo trains."""
    path.write_text("\n".join(json.dumps(row) for row in rows))
    job = client.jobs.submit(
        dataset=client.datasets.upload(path)["id"],
        adapter={"method": "lora", "rank": 16},
        training={"max_steps": STEPS, "batch_size": BATCH, "learning_rate": 1.5e-3},
        validation=0,
    )
    return str(job["id"])


def test_right_completions_reach_the_bar_and_shuffled_ones_do_not(client: Client, tmp_path: Path) -> None:
    rows, held_out = TASK.train_rows(STEPS * BATCH), TASK.heldout_rows(NUM_HELD_OUT)
    completions = [row["completion"] for row in rows]
    random.Random(1).shuffle(completions)
    shuffled = [{**row, "completion": text} for row, text in zip(rows, completions, strict=True)]
    ids = [submit(client, some, tmp_path / f"{n}.jsonl") for n, some in enumerate((rows, shuffled))]
    assert [client.jobs.wait(id_, seconds=0.2)["status"] for id_ in ids] == ["succeeded"] * 2
    base, right, wrong = accuracies([Exam(client, model, held_out, TASK.max_tokens) for model in ("base", *ids)])
    print(f"base {base:.0%}, right {right:.0%}, shuffled {wrong:.0%}, majority {majority_accuracy(rows, held_out):.0%}")
    assert right >= base + BAR
    assert wrong < base + BAR
