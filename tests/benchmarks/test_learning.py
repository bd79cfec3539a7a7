"""The study runs as one command over the real server; what it finds is for a real model to say."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.learning import METHODS, main, wilson
from tests.base_folder import write_tiny_base


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Wide enough for a LoRA of rank 80."""
    folder = write_tiny_base(tmp_path / "base")
    sizes = {"hidden_size": 96, "intermediate_size": 96, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = AutoConfig.for_model("llama", num_hidden_layers=1, vocab_size=512, max_position_embeddings=256, **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    monkeypatch.setenv("MIXLOOM_BASE", str(folder))
    monkeypatch.setenv("MIXLOOM_DTYPE", "float32")
    return folder


def write_rows(file: Path, count: int) -> str:
    rows = (
        {"prompt": f"Is {n} even?", "completion": f"It is {n % 2 == 0}.", "answer": str(n % 2 == 0)}
        for n in range(count)
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.slow
def test_all_methods_train_at_once_and_answer(base: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    files = ["--train", write_rows(tmp_path / "even.train.jsonl", 12), "--test", write_rows(tmp_path / "even.test", 5)]
    options = ["--steps", "2", "--batch", "2", "--asked", "4", "--dir", str(tmp_path / "study"), "--json", str(report)]
    assert main([*files, *options]) == 0
    results = json.loads(report.read_text())["results"]
    assert [result["method"] for result in results] == ["base", *METHODS]
    for result in results:
        low, high = result["interval_95"]
        assert result["asked"] == 4
        assert low <= result["accuracy"] == result["right"] / 4 <= high
        assert ("experts" in result) == result["method"].startswith("Mix")


def test_a_row_without_an_answer_is_refused_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "Say.", "completion": "yes"}) + "\n")
    assert main(["--train", str(file), "--test", str(file)]) == 2
    assert "line 1: a row needs prompt, completion and answer" in capsys.readouterr().err


@pytest.mark.parametrize(("right", "asked", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634)])
def test_the_interval_is_wilsons(right: int, asked: int, low: float, high: float) -> None:
    """Figures of Agresti and Coull (1998), rounded."""
    assert wilson(right, asked) == pytest.approx((low, high), abs=1e-4)
