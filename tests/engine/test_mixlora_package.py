"""The authors' own package, unmodified, reads what we export and says what we say (compared in float32)."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedModel

from engine import formats
from engine.config import AdapterConfig
from engine.engine import Engine
from engine.run import Microbatch, Run
from tests.engine.loads import mixlora, random_row
from tests.engine.others import largest_difference, our_logprobs, publish, shake_gently, their_logprobs
from tests.models import smollm2_folder, tiny_base, tiny_model

package = pytest.importorskip("mixlora", reason="needs the package mixlora 0.2.3")

CONFIGS = {
    "4 experts, top 2": mixlora(dropout=0.0),
    "8 experts, top 3, rank 8": mixlora(8, 8, 3, dropout=0.0),
    "top 1": mixlora(4, 4, 1, dropout=0.0),
    "all of 3 experts": mixlora(2, 3, 3, dropout=0.0, router_aux_loss_coef=0.0),
    "feed-forward only": mixlora(dropout=0.0, target_modules=("gate_proj", "up_proj", "down_proj")),
    "rsLoRA": mixlora(dropout=0.0, rslora=True),
    "two modules": mixlora(dropout=0.0, target_modules=("v_proj", "down_proj")),
}
FAMILIES = ["llama", "mistral", "qwen2", "gemma", "gemma2"]
"""Those of ours that the package knows."""


def exported(engine: Engine, run: Run, folder: Path, base: Path) -> Path:
    """The adapter in the package's layout, with the folder of its base in it."""
    target = folder / "mixlora"
    target.mkdir()
    formats.export(publish(engine, run, folder / "native", str(base)), target, "mixlora")
    return target


def loaded(folder: Path) -> PreTrainedModel:
    model, _ = package.MixLoraModelForCausalLM.from_pretrained(str(folder), attn_implementation="eager")
    return model.eval()


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Its experts lie in plain dicts, which `eval` does not reach."""
    for layer in model.model.layers:
        for expert in layer.mlp.mixlora_moes["default"].experts_.values():
            expert.dropout_.p = 0.0
    return model


def saved_base(folder: Path, model_type: str = "llama") -> Path:
    tiny_model(model_type).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_package_gives_our_logprobs_for_our_files(engine: Engine, config: AdapterConfig, tmp_path: Path) -> None:
    run = engine.create_run(config, seed=0)
    shake_gently(run, 0, 0.2)
    theirs = their_logprobs(loaded(exported(engine, run, tmp_path, saved_base(tmp_path / "base"))))
    ours = our_logprobs(engine, run)
    assert largest_difference(ours, our_logprobs(engine, None)) > 0.5
    assert largest_difference(ours, theirs) < 1e-5


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_package_gives_our_logprobs_on_each_family_that_it_knows(model_type: str, tmp_path: Path) -> None:
    engine = Engine(tiny_base(model_type))
    run = engine.create_run(mixlora(dropout=0.0), seed=0)
    shake_gently(run, 0, 0.2)
    theirs = their_logprobs(loaded(exported(engine, run, tmp_path, saved_base(tmp_path / "base", model_type))))
    assert largest_difference(our_logprobs(engine, run), theirs) < 1e-5


def test_an_adapter_that_was_trained_with_dropout_gives_our_logprobs(engine: Engine, tmp_path: Path) -> None:
    run = engine.create_run(mixlora(4, 8, 2, dropout=0.05), seed=0)
    draw = np.random.default_rng(0)
    rows = [random_row(20, draw) for _ in range(3)]
    for _ in range(5):
        engine.forward_backward([Microbatch(rows=rows, run=run)])
        engine.optim_step(run, learning_rate=0.05)
    model = without_dropout(loaded(exported(engine, run, tmp_path, saved_base(tmp_path / "base"))))
    ours = our_logprobs(engine, run)
    assert largest_difference(ours, our_logprobs(engine, None)) > 0.5
    assert largest_difference(ours, their_logprobs(model)) < 1e-5


def test_a_dropout_of_zero_is_exported_as_the_tiny_one_that_the_package_takes(engine: Engine, tmp_path: Path) -> None:
    run = engine.create_run(mixlora(dropout=0.0), seed=0)
    folder = exported(engine, run, tmp_path, saved_base(tmp_path / "base"))
    assert 0 < json.loads((folder / "adapter_config.json").read_text())["lora_dropout"] < 1e-8
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.bin"]


@pytest.mark.smollm2
def test_on_smollm2_the_package_gives_our_logprobs_for_our_files(smollm2: Engine, tmp_path: Path) -> None:
    run = smollm2.create_run(mixlora(8, 4, 2, dropout=0.05), seed=0)
    shake_gently(run, 0, 0.03)
    model = without_dropout(loaded(exported(smollm2, run, tmp_path, smollm2_folder())))
    ours = our_logprobs(smollm2, run)
    assert largest_difference(ours, our_logprobs(smollm2, None)) > 0.5
    assert largest_difference(ours, their_logprobs(model)) < 1e-4
