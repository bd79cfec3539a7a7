"""The demo's data."""

import json
from datetime import date

import pytest

from mixloom.demo.tasks import QUEUES, TASKS, Task, majority_accuracy

EVERY_TASK = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


@EVERY_TASK
def test_rows_are_a_pure_function_of_the_seed(task: Task) -> None:
    assert task.train_rows(50, seed=3) == task.train_rows(50, seed=3)
    assert task.train_rows(50, seed=3) != task.train_rows(50, seed=4)
    assert task.train_rows(50, seed=3) == task.train_rows(60, seed=3)[:50]


@EVERY_TASK
def test_no_held_out_prompt_occurs_in_training(task: Task) -> None:
    held_out = {row["prompt"] for row in task.heldout_rows(150)}
    assert len(held_out) == 150
    for seed in range(5):
        train = {row["prompt"] for row in task.train_rows(300, seed)}
        assert len(train) == 300
        assert not train & held_out


@EVERY_TASK
def test_rows_are_short(task: Task) -> None:
    for row in task.train_rows(300):
        assert len(row["prompt"]) <= 70
        assert len(row["completion"]) <= 32


def test_queues_are_eight_and_all_of_them_occur() -> None:
    rows = TASKS["queues"].train_rows(160)
    assert len(QUEUES) == 8
    assert {row["completion"] for row in rows} == set(QUEUES)


def test_always_answering_the_majority_answer_is_far_from_enough() -> None:
    for task in TASKS.values():
        assert majority_accuracy(task.train_rows(160), task.heldout_rows(100)) < 0.25


def test_the_answers_are_right() -> None:
    for row in TASKS["orders"].train_rows(200):
        order = json.loads(row["completion"])
        item = next(key for key in order if key != "buyer")
        assert order["buyer"] in row["prompt"]
        assert item in row["prompt"]
    for row in TASKS["dates"].train_rows(200):
        found = date.fromisoformat(row["completion"])
        assert str(found.year) in row["prompt"]
        assert f"{found:%B}" in row["prompt"]
