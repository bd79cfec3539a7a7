"""Bases that cannot be loaded, each a sentence that names it; and what is told of one that can."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import exactness
from engine.base_model import BaseModel, Fingerprint
from engine.errors import EngineError
from server.daemon.main import _load_base
from server.daemon.publish import publish_tokenizer, read_tokenizer
from server.settings import Settings
from server.store import LocalStore
from tests.base_folder import write_tiny_base
from tests.server.conftest import Caller
from tests.server.daemon.conftest import Life


def nothing(folder: Path) -> Path:
    return folder / "nothing"


def no_gguf(folder: Path) -> Path:
    return folder / "model.gguf"


def torn_gguf(folder: Path) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(b"GGUF, or so it says")
    return path


def an_empty_folder(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def pickles_only(folder: Path) -> Path:
    base = write_tiny_base(folder / "pickles")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    return base


def no_config(folder: Path) -> Path:
    base = write_tiny_base(folder / "base")
    (base / "config.json").unlink()
    return base


def torn_weights(folder: Path) -> Path:
    base = write_tiny_base(folder / "base")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return base


def a_lost_layer(folder: Path) -> Path:
    base = write_tiny_base(folder / "base")
    weights = base / "model.safetensors"
    save_file(
        {name: tensor for name, tensor in load_file(weights).items() if ".layers.1." not in name},
        weights,
        {"format": "pt"},
    )
    return base


def no_tokenizer(folder: Path) -> Path:
    base = write_tiny_base(folder / "base")
    for path in base.glob("tokenizer*"):
        path.unlink()
    return base


@pytest.mark.parametrize(
    "make",
    [
        nothing,
        no_gguf,
        torn_gguf,
        an_empty_folder,
        pickles_only,
        no_config,
        torn_weights,
        a_lost_layer,
        no_tokenizer,
    ],
)
def test_a_base_that_cannot_be_used_is_named(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path)
    settings = Settings(data_dir=tmp_path / "data", base=str(path), dtype="float32")

    def start() -> None:
        base, _, source = _load_base(settings)
        read_tokenizer(base, source, settings)

    with pytest.raises(EngineError, match=path.name):
        start()


def test_the_base_is_loaded_as_the_settings_say(folder: Path, tmp_path: Path) -> None:
    settings = {"data_dir": tmp_path, "base": str(folder), "dtype": "bfloat16", "microbatch_tokens": 64}
    for recompute in (False, True):
        base, _, _ = _load_base(Settings(**settings, recompute=recompute))
        assert (base.dtype, base.microbatch_tokens, base.recompute) == (torch.bfloat16, 64, recompute)


def test_the_base_promises_bits_where_the_facts_hold_and_names_those_that_do_not(
    new_life: Callable[..., Life], frozen: BaseModel, alice: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said() -> tuple[str, list[str]]:
        new_life()
        base = alice.get("/base").json()
        assert base["fingerprint"] == asdict(Fingerprint.of(frozen))
        return base["probe"]["exact"], base["probe"]["failing_facts"]

    assert said() == ("bitwise", [])
    monkeypatch.setitem(exactness.FACTS, "segments anywhere in a pack", lambda *_: False)
    assert said() == ("to rounding", ["segments anywhere in a pack"])


def test_a_restart_leaves_the_published_tokenizer_untouched_unless_it_has_changed(
    frozen: BaseModel, folder: Path, tmp_path: Path
) -> None:
    store, settings = LocalStore(tmp_path / "data"), Settings(data_dir=tmp_path / "data")
    files = read_tokenizer(frozen, folder, settings)
    path = store.path(publish_tokenizer(store, frozen, files))
    first = path.stat().st_ino
    publish_tokenizer(store, frozen, files)
    assert path.stat().st_ino == first
    for name in files:
        (path / name).write_bytes(b"\xff")
        publish_tokenizer(store, frozen, files)
        assert {file.name: file.read_bytes() for file in path.iterdir()} == files, "what is damaged is written anew"
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}")
    other = read_tokenizer(frozen, folder, settings.model_copy(update={"chat_template": template}))
    publish_tokenizer(store, frozen, other)
    assert (path / "chat_template.jinja").read_text() == "{{ messages }}"
