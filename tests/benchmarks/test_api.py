"""The benchmark asks the real server; how soon it answers is for a machine to say."""

import json
from pathlib import Path

import pytest

from benchmarks.api import MIX, main


@pytest.mark.slow
def test_one_command_asks_while_jobs_train_and_counts_every_answer(tmp_path: Path):
    report_file = tmp_path / "api.json"
    assert main(["--rate", "10", "--seconds", "3", "--json", str(report_file)]) == 0
    report = json.loads(report_file.read_text())
    assert report["failures"] == {}
    assert report["jobs_lost"] == 0
    assert report["gangs_meanwhile"] > 0
    counts = {kind: report["milliseconds"][kind]["count"] for kind in MIX}
    assert sum(counts.values()) == report["milliseconds"]["all"]["count"] == 30
    assert report["jobs_accepted"] == counts["POST /jobs"] > 0
