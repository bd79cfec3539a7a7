"""The benchmark trains the demo's jobs on the real server; what that adds is for a real base to say."""

import json
from pathlib import Path

import pytest

from benchmarks.overhead import main


@pytest.mark.slow
def test_one_command_sets_the_engines_time_beside_all_of_it(base_folder: Path, tmp_path: Path) -> None:
    report_file = tmp_path / "overhead.json"
    assert main(["--base", str(base_folder), "--steps", "3", "--json", str(report_file)]) == 0
    report = json.loads(report_file.read_text())
    assert report["gangs"] >= 3
    assert 0 < report["seconds"]["engine"] < report["seconds"]["wall"]
    assert report["outside"] == pytest.approx(1 - report["seconds"]["engine"] / report["seconds"]["wall"])
