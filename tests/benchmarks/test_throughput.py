"""The benchmark runs as one command and measures what it says; whether we are fast is for a quiet machine to say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.apart import Apart
from benchmarks.bases import Bases
from benchmarks.contenders import CONTENDERS, PackedLimit, SequenceLimit, require_same_loss
from benchmarks.data import Step, all_rows, make_steps
from benchmarks.errors import BenchmarkError
from benchmarks.hf_peft import IGNORED, collate
from benchmarks.throughput import main, taking_part
from engine import mkl
from engine.run import Row

ROOT = Path(__file__).parent.parent.parent
SECONDS = 150
METHODS = ["lora", "mixlora"]
PACKING = ("mixlora_one_job_a_pass", "mixlora")
RATIOS = {
    "mixlora_over_limit",
    "mixlora_over_peft",
    "mixlora_over_lora",
    "lora_over_limit",
    "lora_over_peft",
    "packing_gain",
}


@pytest.fixture(scope="module")
def bases(base_folder: Path) -> Bases:
    return Bases(base_folder, "float32", "cpu", jobs=2, jobs_a_pass=2)


@pytest.fixture(scope="module")
def steps(bases: Bases) -> list[Step]:
    return make_steps(bases.packed, bases.folder, [], jobs=2, batch=3, rows=12)


def write_rows(file: Path, words: list[str]) -> Path:
    file.write_text("".join(json.dumps({"prompt": "Say.", "completion": word}) + "\n" for word in words))
    return file


def gradients_at_embeddings(model: nn.Module, limit: PackedLimit | SequenceLimit, step: Step) -> Tensor:
    """[tokens, width], the padding of the pack left out."""
    seen: list[Tensor] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    limit.step(step)
    handle.remove()
    return torch.cat([output.grad[0] for output in seen])[: sum(len(row.tokens) for row in all_rows([step]))]


def test_one_command_gives_every_figure(bases: Bases, tmp_path: Path):
    file = tmp_path / "report.json"
    arguments = ["--jobs", "2", "--batch", "2", "--rows", "8", "--rounds", "2", "--dtype", "float32"]
    arguments += ["--jobs-a-pass", "1", "--methods", *METHODS]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "throughput", *arguments, "--base", bases.folder, "--json", file],
        cwd=ROOT,
        timeout=SECONDS,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "packing_gain" in done.stdout

    report = json.loads(file.read_text())
    assert set(report["ratios"]) == RATIOS
    assert set(report["tokens_per_second"]) == {*taking_part(METHODS, moe_peft=False), "limit"}
    assert set(report["memory"]["peak_bytes"]) == set(taking_part(METHODS, moe_peft=False))
    figures = [report["ratios"], report["tokens_per_second"], report["memory"]["peak_bytes"], report["first_loss"]]
    assert all(value > 0 for named in figures for value in named.values())

    losses = report["first_loss"].values()
    assert max(losses) == pytest.approx(min(losses), rel=1e-5)  # all do the same work
    speeds = report["tokens_per_second"]
    assert speeds["limit"] == max(speeds["limit_packed"], speeds["limit_transformers"])
    assert report["ratios"]["packing_gain"] == speeds["mixlora"] / speeds["mixlora_one_job_a_pass"]
    assert [each["packing_gain"] for each in report["ratios_of_rounds"]] == pytest.approx(
        [
            alone["seconds"] / together["seconds"]
            for alone, together in zip(*(report["turns"][name] for name in PACKING), strict=True)
        ]
    )
    trainable = report["trainable_parameters"]
    assert trainable["limit_packed"] == trainable["limit_transformers"] == 0
    assert trainable["peft"] == trainable["lora"] > 0
    assert trainable["mixlora"] > 0
    assert all(len(turns) == 2 for turns in report["turns"].values())
    assert {"capability", "flags", "threads", "torch", "transformers", "peft"} <= set(report["machine"])
    assert str(bases.folder.parent) not in file.read_text()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can see")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_runs_on_a_gpu(base_folder: Path, tmp_path: Path, dtype: str):
    file = tmp_path / "report.json"
    arguments = ["--jobs", "2", "--batch", "2", "--rows", "8", "--rounds", "1", "--dtype", dtype]
    arguments += ["--methods", "lora", "mixlora", "dora", "mixdora", "--base", str(base_folder), "--json", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "throughput", *arguments],
        cwd=ROOT,
        timeout=SECONDS,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report["machine"]["device"] == torch.cuda.get_device_name()
    assert all(value > 0 for value in report["tokens_per_second"].values())


def test_only_the_methods_that_were_asked_for_take_part():
    limits = ["limit_packed", "limit_transformers"]
    assert taking_part(["dora", "lora"], moe_peft=False) == [*limits, "lora", "dora", "peft"]
    assert taking_part(["mixlora"], moe_peft=True) == [*limits, "mixlora", "mixlora_one_job_a_pass", "peft", "moe_peft"]


@pytest.mark.parametrize("losses", [[2.0, 2.001], [2.0, float("nan")]])
def test_contenders_that_start_from_different_losses_are_refused(losses: list[float]):
    require_same_loss([2.0, 2.0001], "float32")
    with pytest.raises(BenchmarkError, match="different losses"):
        require_same_loss(losses, "float32")


def test_both_limits_do_the_same_work(bases: Bases, steps: list[Step]):
    """The whole backward runs: the gradient arrives at every token's embedding, and both find the same."""
    plain = bases.plain()
    ours = gradients_at_embeddings(bases.packed.model, PackedLimit(bases.packed), steps[0])
    theirs = gradients_at_embeddings(plain, SequenceLimit(plain), steps[0])
    torch.testing.assert_close(ours, theirs)
    supervised_or_before = all_rows(steps[:1])[0].targets[-1]
    assert (ours[:supervised_or_before].abs().sum(1) > 0).all()


def test_the_limit_leaves_no_gradient_behind_for_those_who_train(bases: Bases, steps: list[Step]):
    PackedLimit(bases.packed).step(steps[0])
    embeddings = bases.packed.model.get_input_embeddings()
    assert not embeddings(torch.tensor([1])).requires_grad


def test_a_padded_batch_masks_its_padding_and_asks_for_supervised_tokens_alone():
    rows = [
        Row(np.array([5, 6, 7]), np.array([2]), np.ones(1)),
        Row(np.array([8, 9, 10, 11, 12]), np.array([3, 4]), np.ones(2)),
    ]
    batch = collate(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7, IGNORED, IGNORED], [IGNORED, IGNORED, IGNORED, 11, 12]]
    assert batch["input_ids"][0, :3].tolist() == [5, 6, 7]


def test_the_same_options_give_the_same_token_lists(bases: Bases, steps: list[Step]):
    again = make_steps(bases.packed, bases.folder, [], jobs=2, batch=3, rows=12)
    assert [len(step) for step in steps] == [2, 2]
    assert [row.tokens.tolist() for row in all_rows(again)] == [row.tokens.tolist() for row in all_rows(steps)]
    assert len({tuple(row.tokens) for row in all_rows(steps)}) == 12


def test_each_supervised_token_weighs_its_share_of_its_jobs_batch(steps: list[Step]):
    for rows in steps[0]:
        assert sum(row.weights.sum() for row in rows) == pytest.approx(1)


def test_files_take_turns_and_a_file_used_twice_goes_on_where_it_was(bases: Bases, tmp_path: Path):
    letters = write_rows(tmp_path / "letters.jsonl", ["a", "b", "c", "d"])
    digits = write_rows(tmp_path / "digits.jsonl", ["1", "2"])
    (step,) = make_steps(bases.packed, bases.folder, [letters, digits], jobs=3, batch=2, rows=6)
    alone = make_steps(bases.packed, bases.folder, [letters], jobs=1, batch=4, rows=4)
    tokens = [[row.tokens.tolist() for row in rows] for rows in step]
    assert [*tokens[0], *tokens[2]] == [row.tokens.tolist() for row in alone[0][0]]
    assert not any(row in tokens[1] for row in tokens[0])


@pytest.mark.parametrize(
    ("content", "rows", "said"),
    [
        ('{"prompt": "Say.", "completion": "a"}\n', 5, "multiple of jobs x batch = 2"),
        ('{"prompt": "Say.", "completion": "a"}\n', 2, "has 1 rows, 2 are needed"),
        ('{"question": "Say."}\n' * 2, 2, "needs prompt and completion"),
        ("nothing\n", 2, "JSON"),
        (json.dumps({"prompt": "long " * 100, "completion": "a"}) + "\n", 1, "this base takes 256"),
    ],
)
def test_data_that_does_not_fit_is_refused_with_a_sentence(
    bases: Bases, tmp_path: Path, content: str, rows: int, said: str
):
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    with pytest.raises(BenchmarkError, match=said):
        make_steps(bases.packed, bases.folder, [file], jobs=1, batch=min(rows, 2), rows=rows)


def test_a_base_that_is_not_there_ends_with_one_line_and_the_code_2(capsys: pytest.CaptureFixture[str]):
    assert main(["--base", "no/model.gguf", "--dtype", "float32"]) == 2
    assert capsys.readouterr().err.startswith("benchmarks: There is no GGUF file")


def test_others_compute_in_a_process_of_their_own_under_torchs_defaults(
    bases: Bases, steps: list[Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    apart = Apart("limit_transformers", bases)
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    assert apart.process.submit(os.getenv, "OMP_WAIT_POLICY").result() is None
    assert apart.process.submit(mkl.mode).result() == "OFF"
    assert apart.step(steps[0]) == pytest.approx(CONTENDERS["limit_transformers"](bases).step(steps[0]), rel=1e-5)
