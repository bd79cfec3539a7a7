"""The sweep runs as one command; whether packing gains is for a quiet machine to say."""

import json
from pathlib import Path

import pytest

from benchmarks.bases import Bases
from benchmarks.data import cut_rows
from benchmarks.errors import BenchmarkError
from benchmarks.sweep import PASS_TOKENS, main


def sweep(base_folder: Path, file: Path, *options: str) -> list[dict]:
    assert main([*options, "--base", str(base_folder), "--dtype", "float32", "--json", str(file)]) == 0
    return json.loads(file.read_text())["cells"]


def test_quick_is_two_cells_with_their_gains(base_folder: Path, tmp_path: Path):
    cells = sweep(base_folder, tmp_path / "sweep.json", "--quick")
    assert [(cell["jobs"], cell["rows"], cell["tokens"], cell["jobs_a_pass"]) for cell in cells] == [
        (1, 1, 40, 1),
        (4, 1, 40, 4),
    ]
    for cell in cells:
        speeds = cell["tokens_per_second"]
        assert cell["gain"] == pytest.approx(speeds["together"] / speeds["one_by_one"])
        (together,), (alone,) = cell["turns"].values()
        assert cell["gain_of_passes"] == alone["passes"] / together["passes"]
        assert min(*together.values(), *alone.values()) > 0


def test_jobs_that_do_not_fit_one_pass_take_several(base_folder: Path, tmp_path: Path):
    options = ["--jobs", "4", "--rows", "8", "--tokens", "250", "--rounds", "1", "--method", "lora"]
    (cell,) = sweep(base_folder, tmp_path / "sweep.json", *options)
    assert cell["jobs_a_pass"] == PASS_TOKENS // (8 * 250) == 2


def test_cut_rows_have_the_tokens_that_were_asked_for(base_folder: Path):
    base = Bases(base_folder, "float32", "cpu", jobs=2, jobs_a_pass=2).packed
    step = cut_rows(base, base_folder, jobs=2, rows=3, tokens=40)
    rows = [row for job in step for row in job]
    assert [len(job) for job in step] == [3, 3]
    assert {len(row.tokens) for row in rows} == {40}
    assert len({tuple(row.tokens) for row in rows}) == 6
    for job in step:
        assert sum(row.weights.sum() for row in job) == pytest.approx(1)
    with pytest.raises(BenchmarkError, match="from 4 to 256"):
        cut_rows(base, base_folder, jobs=1, rows=1, tokens=300)
