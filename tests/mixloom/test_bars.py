"""Jobs on a terminal."""

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from mixloom import Client
from mixloom.cli import bars


def test_a_terminal_gets_a_bar_a_job(
    alice: Client, job_id: str, finish: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Console(force_terminal=True, file=io.StringIO(), width=140)
    monkeypatch.setattr(bars, "stdout", terminal)
    finish(job_id)
    assert bars.follow(alice, [job_id], as_json=False) == 0
    shown = terminal.file.getvalue()
    assert "sums" in shown
    assert "3/3" in shown
    assert "succeeded" in shown


def test_the_last_validation_loss_stays_in_sight(alice: Client, job_id: str) -> None:
    job = alice.jobs.get(job_id)
    metrics = {"train_loss": 0.5, "valid_loss": None, "tokens_per_second": 99.6}
    running = {**job, "status": "running", "metrics": metrics}
    assert bars.figures(running, 0.25) == "loss 0.500  valid 0.250  100 tokens/s"
    assert bars.figures(job, None) == ""
    assert bars.state({**job, "requested": "pause"}).startswith("queued (pause requested)")
