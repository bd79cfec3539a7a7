"""MoE-PEFT as a contender: what it is given. Where its environment is named, also that it does the same work."""

import json
import os
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from benchmarks.bases import Bases
from benchmarks.contenders import CONTENDERS, Packed
from benchmarks.data import make_steps
from benchmarks.errors import BenchmarkError
from benchmarks.moe_peft_contender import MoePeft, versions, write_old_base
from benchmarks.moe_peft_worker import IGNORED, PADDING, padded
from benchmarks.throughput import main


def test_the_base_is_handed_over_as_older_versions_read_it(base_folder: Path, tmp_path: Path):
    write_old_base(base_folder, tmp_path)
    old = json.loads((tmp_path / "config.json").read_text())
    assert old["rope_theta"] == AutoConfig.from_pretrained(base_folder).rope_parameters["rope_theta"]
    assert "rope_parameters" not in old
    weights = "model.safetensors"
    assert (tmp_path / weights).samefile(base_folder / weights)


def test_positions_that_it_would_get_wrong_are_refused(base_folder: Path, tmp_path: Path):
    config = json.loads((base_folder / "config.json").read_text())
    config["rope_parameters"]["rope_type"] = "yarn"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BenchmarkError, match="plain rotary positions"):
        write_old_base(tmp_path, tmp_path)


def test_rows_are_padded_to_the_longest_of_all_jobs_and_only_supervised_tokens_have_labels():
    rows = [{"tokens": [5, 6, 7], "targets": [2]}, {"tokens": [8, 9, 10, 11], "targets": [2, 3]}]
    tokens, masks, labels = padded(rows)
    assert tokens == [[5, 6, 7, PADDING], [8, 9, 10, 11]]
    assert masks == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert labels == [[IGNORED, IGNORED, 7, IGNORED], [IGNORED, IGNORED, 10, 11]]


def test_an_environment_without_it_ends_with_one_line_and_the_code_2(
    base_folder: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["--moe-peft", sys.executable, "--base", str(base_folder), "--dtype", "float32"]) == 2
    assert "No package metadata was found for moe_peft" in capsys.readouterr().err
    with pytest.raises(BenchmarkError, match="no-such-python"):
        versions(Path("no-such-python"))


def test_a_worker_that_ends_says_why(base_folder: Path):
    with pytest.raises(BenchmarkError, match="No module named 'moe_peft'"):
        MoePeft(Bases(base_folder, "float32", "cpu", jobs=1, jobs_a_pass=1, moe_peft=Path(sys.executable)))


@pytest.mark.slow
def test_it_starts_from_our_loss_and_learns(base_folder: Path):
    """MOE_PEFT_PYTHON names the Python of its environment (benchmarks/README.md)."""
    python = os.environ.get("MOE_PEFT_PYTHON")
    if not python:
        pytest.skip("needs MOE_PEFT_PYTHON")
    bases = Bases(base_folder, "float32", "cpu", jobs=2, jobs_a_pass=2, moe_peft=Path(python))
    (step,) = make_steps(bases.packed, bases.folder, [], jobs=2, batch=2, rows=4)
    ours, theirs = Packed(bases.packed, bases.runs("mixlora"), 2), CONTENDERS["moe_peft"](bases)
    assert theirs.trainable_parameters == ours.trainable_parameters
    losses = [theirs.step(step) for _ in range(20)]
    assert losses[0] == pytest.approx(ours.step(step), rel=1e-5)
    assert losses[-1] < losses[0]
