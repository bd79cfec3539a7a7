"""The benchmark kills real processes, and says so when a job ends otherwise than it would have."""

import json
from pathlib import Path

import pytest

from benchmarks.chaos import main
from tests.postgresql import PostgreSQL


@pytest.mark.slow
def test_a_few_kills_of_each_kind_change_nothing(tmp_path: Path) -> None:
    report_file = tmp_path / "chaos.json"
    assert main(["--kills", "8", "--seed", "4", "--json", str(report_file)]) == 0
    report = json.loads(report_file.read_text())
    assert sum(report["kills"].values()) == 8
    assert min(report["kills"].values()) >= 1
    assert report["jobs"] == 5 * report["rounds"]
    assert report["failures"] == []


@pytest.mark.slow
def test_kills_change_nothing_on_postgresql_either(tmp_path: Path, postgresql: PostgreSQL) -> None:
    report_file, url = tmp_path / "chaos.json", postgresql.new_database()
    assert main(["--kills", "4", "--seed", "5", "--database-url", url, "--json", str(report_file)]) == 0
    report = json.loads(report_file.read_text())
    assert (report["settings"]["database"], sum(report["kills"].values())) == ("postgresql", 4)
