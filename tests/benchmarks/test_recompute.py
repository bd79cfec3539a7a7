"""The benchmark sets passes with `recompute` against those without; how much that saves is for a deep base to say."""

import json
from pathlib import Path

from benchmarks.recompute import main


def test_one_command_sets_both_kinds_of_passes_side_by_side(base_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    arguments = ["--tokens", "128", "--repeats", "1", "--dtype", "float32", "--methods", "mixdora"]
    assert main([*arguments, "--base", str(base_folder), "--json", str(file)]) == 0
    without, with_ = json.loads(file.read_text())["rows"]
    assert (without["recompute"], with_["recompute"]) == (False, True)
    assert with_["peak_bytes"] < without["peak_bytes"]
    assert with_["same_bits"]
