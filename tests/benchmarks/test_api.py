"""The benchmark asks the real server; how soon it answers is for a machine to say."""

import json
from pathlib import Path

import pytest

from benchmarks import api
from benchmarks.api import MIX, exit_code, main


@pytest.mark.slow
def test_one_command_asks_while_jobs_train_and_counts_every_answer(tmp_path: Path) -> None:
    report_file = tmp_path / "api.json"
    assert main(["--rate", "10", "--seconds", "3", "--json", str(report_file)]) == 0
    report = json.loads(report_file.read_text())
    assert report["failures"] == {}
    assert report["jobs_lost"] == 0
    assert report["gangs_meanwhile"] > 0
    counts = {kind: report["milliseconds"][kind]["count"] for kind in MIX}
    assert sum(counts.values()) == report["milliseconds"]["all"]["count"] == 30
    assert report["jobs_accepted"] == counts["POST /jobs"] > 0


@pytest.mark.parametrize(
    ("failures", "num_lost", "code"), [({}, 0, 0), ({"GET /jobs/ID 503": 1}, 0, 1), ({}, 1, 1)], ids=str
)
def test_a_request_that_failed_and_a_job_that_is_lost_are_told_by_the_exit_code(
    failures: dict[str, int], num_lost: int, code: int
) -> None:
    assert exit_code({"failures": failures, "jobs_lost": num_lost}) == code


@pytest.mark.slow
def test_one_command_that_is_refused_something_ends_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MIX", {"GET /jobs/ID": 1, "GET /nothing": 1})
    report_file = tmp_path / "api.json"
    assert main(["--rate", "10", "--seconds", "2", "--json", str(report_file)]) == 1
    report = json.loads(report_file.read_text())
    assert report["failures"] == {"GET /nothing 404": report["milliseconds"]["GET /nothing"]["count"]}
