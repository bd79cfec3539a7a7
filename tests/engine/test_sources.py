"""Where a base comes from, and the sentence for one that cannot be had."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import base_model, sources
from engine.engine import Engine
from engine.errors import EngineError
from tests.engine.gguf_file import write_gguf
from tests.engine.others import largest_difference, our_logprobs, their_logprobs
from tests.models import smollm2_folder, tiny_model

ROOT = Path(__file__).parents[2]


def saved(folder: Path) -> Path:
    tiny_model().save_pretrained(folder)
    return folder


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert sources.resolve(str(tmp_path)) == tmp_path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of converted models."""
    monkeypatch.setattr(sources, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def test_a_gguf_file_becomes_a_base_with_the_same_weights(cache: Path, tmp_path: Path) -> None:
    folder = sources.resolve(str(write_gguf(tiny_model(), tmp_path / "tiny.gguf")))
    assert folder.parent == cache
    base = base_model.load(folder, name="tiny", dtype=torch.float32, device="cpu")
    assert largest_difference(our_logprobs(Engine(base), None), their_logprobs(tiny_model())) < 1e-6
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}


def test_a_gguf_file_is_converted_once_and_another_one_anew(cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tiny_model(), tmp_path / "tiny.gguf")
    folder = sources.resolve(str(path))
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert sources.resolve(str(path)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    model = tiny_model()
    model.lm_head.weight.data.mul_(2)
    assert sources.resolve(str(write_gguf(model, path))) != folder
    assert len(list(cache.iterdir())) == 2


def test_of_two_that_convert_at_once_the_slower_takes_the_folder_of_the_faster(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tiny_model(), tmp_path / "tiny.gguf")
    folder = sources.resolve(str(path))
    aside = folder.rename(tmp_path / "aside")
    make_folder = tempfile.mkdtemp

    def overtaken(**where: Any) -> str:
        aside.rename(folder)  # by the faster one
        return make_folder(**where)

    monkeypatch.setattr(sources.tempfile, "mkdtemp", overtaken)
    assert sources.resolve(str(path)) == folder
    assert list(cache.iterdir()) == [folder]


def test_a_gguf_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(EngineError, match=f"There is no GGUF file '{path}'; give the path of one"):
        sources.resolve(str(path))


def test_a_gguf_file_that_is_none_says_so_and_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"this is no model" * 100)
    with pytest.raises(EngineError, match=f"The GGUF file '{path}' cannot be read: "):
        sources.resolve(str(path))
    assert list(cache.iterdir()) == []


def test_an_unknown_name_without_the_internet_gets_a_way_out(tmp_path: Path) -> None:
    """In a process of its own: the hub's library reads its variables once."""
    code = "from engine.sources import resolve\nresolve('nobody/no-such-model')"
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=offline, capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        "EngineError: The base 'nobody/no-such-model' is neither a local folder, a GGUF file nor a model that the hub "
        "gave (LocalEntryNotFoundError). Give a path, or connect to the internet and check the name" in done.stderr
    )


@pytest.mark.parametrize("name", ["no such/model!", "a/b/c"])
def test_a_name_that_cannot_be_one_gets_the_same_sentence(name: str) -> None:
    with pytest.raises(EngineError, match=f"The base '{name}' is neither a local folder"):
        sources.resolve(name)


@pytest.mark.parametrize("files", [[], ["pytorch_model.bin", "config.json"]], ids=["empty", "a pickle"])
def test_a_folder_without_safetensors_is_refused(files: list[str], tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(EngineError, match=r"holds no \*\.safetensors; convert the model first \(pickles are never"):
        base_model.load(tmp_path, name="x", dtype=torch.float32, device="cpu")


def test_the_hash_is_that_of_weights_and_config(tmp_path: Path) -> None:
    one, other = saved(tmp_path / "one"), saved(tmp_path / "other")
    first = base_model.hash_of(one)
    assert base_model.hash_of(other) == first
    (other / "README.md").write_text("another name")
    assert base_model.hash_of(other) == first
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    config = one / "config.json"
    config.write_text(config.read_text().replace("silu", "gelu"))
    assert len({first, base_model.hash_of(one), base_model.hash_of(other)}) == 3


def test_a_loaded_base_says_what_it_is(tmp_path: Path) -> None:
    base = base_model.load(saved(tmp_path), name="mine", dtype=torch.bfloat16, device="cpu", microbatch_tokens=64)
    assert (base.name, base.hash, base.dtype) == ("mine", base_model.hash_of(tmp_path), torch.bfloat16)
    assert (base.num_layers, base.context, base.microbatch_tokens) == (2, 256, 64)
    assert base.num_parameters == sum(p.numel() for p in tiny_model().parameters())
    assert base.shapes["k_proj"] == (16, 32)
    assert base.shapes.keys() == {*(f"{m}_proj" for m in "qkvo"), "gate_proj", "up_proj", "down_proj"}


@pytest.mark.smollm2
def test_the_default_is_converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = smollm2_folder()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert sources.resolve("smollm2-135m") == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= before.keys()
