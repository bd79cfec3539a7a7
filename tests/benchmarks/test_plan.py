"""The benchmark drives the daemon's own loop on a real database; whether that is quick is for a machine to say."""

import json
from pathlib import Path

from benchmarks.plan import PARTS, main


def test_one_command_measures_each_part_of_a_turn(tmp_path: Path):
    report_file = tmp_path / "plan.json"
    assert main(["--tenants", "9", "--jobs", "30", "--gangs", "4", "--places", "3", "--json", str(report_file)]) == 0
    report = json.loads(report_file.read_text())
    assert report["resident_runs"] == 3
    assert report["settings"]["database"] == "sqlite"
    for part in PARTS:
        figures = report["milliseconds"][part]
        assert 0 < figures["median"] <= figures["max"]
