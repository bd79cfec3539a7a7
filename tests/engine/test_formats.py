"""Adapters on disk: names, bytes, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine import formats
from engine.config import AdapterConfig
from engine.engine import Engine
from engine.errors import EngineError
from tests.engine.loads import lora, mixlora, shake
from tests.engine.others import publish
from tests.models import tiny_base

CONFIGS = {
    "LoRA": lora(),
    "rsLoRA": lora(8, rslora=True, alpha=3.5, dropout=0.0),
    "MixLoRA": mixlora(2, 3, 2),
    "DoRA": lora(2, dora=True),
    "MixDoRA": mixlora(2, 3, 2, dora=True),
    "MixLoRA on two modules": mixlora(2, 3, 1, target_modules=("o_proj", "up_proj"), router_aux_loss_coef=0.0),
}


def published(engine: Engine, config: AdapterConfig, folder: Path) -> Path:
    run = engine.create_run(config, seed=0)
    shake(run, 0)
    return publish(engine, run, folder)


def test_a_copy_of_an_adapter_stays_as_it_was_while_the_run_trains_on(engine: Engine) -> None:
    run = engine.create_run(mixlora(2, 3, 2), 0)
    copy, before = run.adapter.copy(), run.adapter.flat.clone()
    run.gradient.fill_(1.0)
    engine.optim_step(run, learning_rate=0.1)
    assert not torch.equal(run.adapter.flat, before)
    assert torch.equal(copy.flat, before)
    names = dict(copy.named())
    for name, tensor in formats.tensors(copy).items():
        assert tensor.is_contiguous(), name
    assert len(formats.tensors(copy)) == len(names)


def test_lora_has_the_tensors_of_peft(engine: Engine, tmp_path: Path) -> None:
    tensors = load_file(published(engine, lora(), tmp_path) / formats.WEIGHTS)
    blocks = {"self_attn": "qkvo", "mlp": ("gate", "up", "down")}
    assert tensors.keys() == {
        f"base_model.model.model.layers.{layer}.{block}.{module}_proj.lora_{matrix}.weight"
        for layer in range(2)
        for block, modules in blocks.items()
        for module in modules
        for matrix in "AB"
    }
    assert tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"].shape == (4, 64)
    assert tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"].shape == (16, 4)


def test_mixlora_has_the_tensors_of_the_authors_package(engine: Engine, tmp_path: Path) -> None:
    tensors = load_file(published(engine, mixlora(2, 3, 2), tmp_path) / formats.WEIGHTS)
    layers = [f"mixlora.layers.{layer}" for layer in range(2)]
    attention = {f"{x}.self_attn.{m}_proj.lora_{ab}.weight" for x in layers for m in "qkvo" for ab in "AB"}
    experts = {
        f"{x}.mlp.{module}_proj.experts.{expert}.lora_{matrix}.weight"
        for x in layers
        for module in ("gate", "up", "down")
        for expert in range(3)
        for matrix in "AB"
    }
    assert tensors.keys() == attention | experts | {f"{x}.mlp.moe_gate.weight" for x in layers}
    assert tensors["mixlora.layers.0.mlp.moe_gate.weight"].shape == (3, 32)
    assert tensors["mixlora.layers.1.mlp.up_proj.experts.2.lora_B.weight"].shape == (64, 2)


def test_the_config_has_what_other_programs_ask_for(engine: Engine, tmp_path: Path) -> None:
    values = json.loads((published(engine, mixlora(2, 3, 2, dropout=0.05), tmp_path) / formats.CONFIG).read_text())
    assert values == {
        "act_fn": "silu",
        "base_model_name_or_path": "tiny",
        "bias": "none",
        "lora_alpha": 4,
        "lora_dropout": 0.05,
        "num_experts": 3,
        "peft_type": "MIXLORA",
        "r": 2,
        "router_aux_loss_coef": 0.01,
        "routing_strategy": "mixlora",
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
        "top_k": 2,
        "use_dora": False,
        "use_rslora": False,
    }


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_same_weights_are_the_same_bytes(engine: Engine, config: AdapterConfig, tmp_path: Path) -> None:
    one, other = (published(engine, config, tmp_path / name) for name in ("one", "other"))
    for name in (formats.WEIGHTS, formats.CONFIG):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    exported = [tmp_path / "three", tmp_path / "four"]
    layout = "native" if config.dora else "mixlora" if config.is_mixture else "peft"
    for source, target in zip((one, other), exported, strict=True):
        target.mkdir()
        formats.export(source, target, layout)
    names = sorted(path.name for path in exported[0].iterdir())
    assert [(exported[0] / name).read_bytes() for name in names] == [
        (exported[1] / name).read_bytes() for name in names
    ]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_loaded_adapter_has_the_config_and_the_bits(engine: Engine, config: AdapterConfig, tmp_path: Path) -> None:
    run = engine.create_run(config, seed=0)
    shake(run, 0)
    adapter = engine.load_adapter(publish(engine, run, tmp_path))
    assert adapter.config == config
    assert torch.equal(adapter.flat, run.adapter.flat)


def test_weights_are_float32_over_a_bfloat16_base(tmp_path: Path) -> None:
    engine = Engine(tiny_base(dtype=torch.bfloat16))
    tensors = load_file(published(engine, mixlora(), tmp_path) / formats.WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("damage", ["a tensor is missing", "another rank"])
def test_files_that_do_not_fit_their_config_are_refused(engine: Engine, damage: str, tmp_path: Path) -> None:
    folder = published(engine, lora(), tmp_path)
    values = json.loads((folder / formats.CONFIG).read_text())
    weights = load_file(folder / formats.WEIGHTS)
    if damage == "another rank":
        values["r"] = 8
    else:
        del weights["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    formats.write(weights, values, folder)
    with pytest.raises(EngineError, match=r"q_proj\.lora_A\.weight' is missing or has another shape"):
        engine.load_adapter(folder)


@pytest.mark.parametrize(
    ("config", "layout", "sentence"),
    [
        (mixlora(), "peft", "PEFT has no MixLoRA; take the format mixlora"),
        (lora(), "mixlora", "a LoRA adapter, which the mixlora package does not read; take the format peft"),
        (mixlora(alpha=2.5), "mixlora", "reads only a whole alpha, this one is 2.5"),
        (mixlora(dora=True), "mixlora", "does not keep the magnitudes of MixDoRA; take native"),
    ],
    ids=["MixLoRA for PEFT", "LoRA for mixlora", "alpha 2.5", "MixDoRA"],
)
def test_a_format_that_does_not_fit_is_refused(
    engine: Engine, config: AdapterConfig, layout: str, sentence: str, tmp_path: Path
) -> None:
    source = published(engine, config, tmp_path / "source")
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(EngineError, match=sentence):
        formats.export(source, target, layout)
    assert list(target.iterdir()) == []


def test_peft_and_native_are_the_files_as_they_are_with_their_card(engine: Engine, tmp_path: Path) -> None:
    source = published(engine, lora(), tmp_path / "source")
    (source / formats.CARD).write_text("# an adapter")
    for layout in ("peft", "native"):
        target = tmp_path / layout
        target.mkdir()
        formats.export(source, target, layout)
        assert sorted(path.name for path in target.iterdir()) == sorted(path.name for path in source.iterdir())
        for path in target.iterdir():
            assert path.read_bytes() == (source / path.name).read_bytes()


def test_a_whole_alpha_is_written_as_the_integer_that_the_package_wants(engine: Engine, tmp_path: Path) -> None:
    source = published(engine, mixlora(alpha=6.0), tmp_path / "source")
    target = tmp_path / "target"
    target.mkdir()
    formats.export(source, target, "mixlora")
    alpha = json.loads((target / formats.CONFIG).read_text())["lora_alpha"]
    assert (alpha, type(alpha)) == (6, int)
    weights = torch.load(target / "adapter_model.bin", weights_only=True)
    assert all(torch.equal(weights[name], tensor) for name, tensor in load_file(source / formats.WEIGHTS).items())
