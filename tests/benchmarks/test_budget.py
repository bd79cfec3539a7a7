"""The benchmark of budgets runs as one command; which is best is for a quiet machine to say."""

import json
from pathlib import Path

import pytest

from benchmarks.budget import main


def test_each_budget_has_a_speed_and_a_peak(base_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "budget.json"
    options = ["--budgets", "80", "160", "512", "--jobs", "4", "--rows", "2", "--tokens", "40", "--rounds", "2"]
    assert main([*options, "--base", str(base_folder), "--dtype", "float32", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["budgets"]
    assert [(row["token_budget"], row["jobs_a_gang"]) for row in rows] == [(80, 1), (160, 2), (512, 4)]
    for row in rows:
        assert len(row["seconds"]) == 2
        assert min(row["tokens_per_second"], row["peak_bytes"]) > 0


def test_a_budget_that_has_no_room_for_a_job_is_refused(base_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--budgets", "79", "--rows", "2", "--tokens", "40", "--base", str(base_folder), "--dtype", "float32"]
    assert main(options) == 2
    assert "80 tokens a step" in capsys.readouterr().err
