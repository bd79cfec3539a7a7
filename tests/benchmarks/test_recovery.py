"""The benchmark writes real points beside real gangs; what it finds is for a real model to say."""

import json
from pathlib import Path

from benchmarks.recovery import main
from tests.base_folder import write_tiny_base


def test_one_command_sets_gangs_with_a_point_beside_gangs_without(tmp_path: Path) -> None:
    report_file = tmp_path / "recovery.json"
    base = write_tiny_base(tmp_path / "base")
    options = ["--base", str(base), "--dtype", "float32", "--gangs", "3", "--dir", str(tmp_path)]
    assert main([*options, "--json", str(report_file)]) == 0
    report = json.loads(report_file.read_text())
    assert len(report["milliseconds"]) == 4
    assert all(value > 0 for value in report["milliseconds"].values())
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["base"]
