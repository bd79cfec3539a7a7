"""The benchmark holds resident jobs against processes; how much is saved is for a base of some size to say."""

import json
from pathlib import Path

import pytest

from benchmarks.memory import main


@pytest.mark.slow
def test_one_command_sets_resident_jobs_against_as_many_processes(base_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    arguments = ["--jobs", "4", "8", "--batch", "2", "--dtype", "float32", "--methods", "mixlora"]
    assert main([*arguments, "--base", str(base_folder), "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    peaks = report["peak_bytes"]
    assert peaks["peft"][1] - peaks["peft"][0] == peaks["peft"][0] - report["before_a_model_bytes"]
    assert peaks["mixlora"][1] < peaks["peft"][1]
    assert report["trainable_parameters"]["mixlora"] > 0
    assert report["bytes_of_one_more_job"]["mixlora"] is not None
