"""Adapters on disk. The only place that knows PEFT's and the `mixlora` package's names.

Native files are `adapter_config.json` and `adapter_model.safetensors`. For LoRA they are HF PEFT's own layout;
for MixLoRA the tensors have the `mixlora` package's names, which itself reads only a `.bin`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.adapter import Adapter
from engine.config import AdapterConfig
from engine.errors import EngineError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
CARD = "README.md"
_SMALLEST_DROPOUT = 1e-9  # the `mixlora` package refuses a dropout of 0


def tensor_name(name: str, *, mixture: bool) -> str:
    """Ours, such as `3.gate_proj.5.A` (layer, module, expert, matrix), -> the name on disk."""
    layer, module, *expert, matrix = name.split(".")
    block = "mlp" if module in ("gate_proj", "up_proj", "down_proj", "router") else "self_attn"
    root = "mixlora" if mixture else "base_model.model.model"
    prefix = f"{root}.layers.{layer}.{block}"
    if module == "router":
        return f"{prefix}.moe_gate.weight"
    place = f"{prefix}.{module}.experts.{expert[0]}" if expert else f"{prefix}.{module}"
    return f"{place}.lora_magnitude_vector" if matrix == "m" else f"{place}.lora_{matrix}.weight"


def disk_config(config: AdapterConfig, *, base_name: str, activation: str) -> dict[str, Any]:
    """The contents of `adapter_config.json`."""
    values: dict[str, Any] = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "peft_type": "MIXLORA" if config.is_mixture else "LORA",
        "r": config.rank,
        "target_modules": list(config.target_modules),
        "task_type": "CAUSAL_LM",
        "use_dora": config.dora,
        "use_rslora": config.rslora,
    }
    if config.is_mixture:
        values |= {
            "act_fn": activation,
            "num_experts": config.num_experts,
            "router_aux_loss_coef": config.router_aux_loss_coef,
            "routing_strategy": "mixlora",
            "top_k": config.top_k,
        }
    return values


def tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The weights in host memory, under their names on disk, sorted; views of the adapter's where they can be."""
    mixture = adapter.config.is_mixture
    named = {tensor_name(name, mixture=mixture): p.cpu().contiguous() for name, p in adapter.named()}
    return dict(sorted(named.items()))


def write(weights: dict[str, Tensor], config: dict[str, Any], folder: Path, card: str | None = None) -> None:
    """Native files: the same weights give the same bytes (sorted names, no times, no ids)."""
    save_file(weights, folder / WEIGHTS)
    _write_json(config, folder / CONFIG)
    if card is not None:
        (folder / CARD).write_text(card)


def read(folder: Path, empty_adapter: Callable[[AdapterConfig], Adapter]) -> Adapter:
    """An adapter from its native files.

    Raises:
        EngineError: tensors are missing or have other shapes than the configuration says.
    """
    values = json.loads((folder / CONFIG).read_text())
    mixture = values["peft_type"] == "MIXLORA"
    config = AdapterConfig(
        method="mixlora" if mixture else "lora",
        rank=values["r"],
        alpha=values["lora_alpha"],
        dropout=values["lora_dropout"],
        rslora=values.get("use_rslora", False),
        dora=values.get("use_dora", False),
        target_modules=tuple(values["target_modules"]),
        num_experts=values.get("num_experts"),
        top_k=values.get("top_k"),
        router_aux_loss_coef=values.get("router_aux_loss_coef"),
    )
    adapter = empty_adapter(config)
    fill(adapter, folder)
    return adapter


def fill(adapter: Adapter, folder: Path) -> None:
    """Set an adapter's weights to those of native files.

    Raises:
        EngineError: tensors are missing or have other shapes than the adapter's.
    """
    stored = load_file(folder / WEIGHTS)
    for name, parameter in adapter.named():
        on_disk = tensor_name(name, mixture=adapter.config.is_mixture)
        tensor = stored.get(on_disk)
        if tensor is None or tensor.shape != parameter.shape:
            raise EngineError(f"'{on_disk}' is missing or has another shape than {list(parameter.shape)}")
        parameter.copy_(tensor)


def export(source: Path, target: Path, layout: str) -> None:
    """Native files -> `target`, in the layout `native`, `peft` or `mixlora`.

    Raises:
        EngineError: the adapter's method has no such layout.
    """
    values = json.loads((source / CONFIG).read_text())
    mixture = values["peft_type"] == "MIXLORA"
    if layout == "peft" and mixture:
        raise EngineError("PEFT has no MixLoRA; take the format mixlora (or native).")
    if layout == "mixlora" and not mixture:
        raise EngineError("This is a LoRA adapter, which the mixlora package does not read; take the format peft.")
    if layout == "mixlora":
        if values["lora_alpha"] != int(values["lora_alpha"]):
            raise EngineError(f"The mixlora package reads only a whole alpha, this one is {values['lora_alpha']}.")
        if values["use_dora"]:  # its `apply_dora` has no magnitudes to load
            raise EngineError("The mixlora package does not keep the magnitudes of MixDoRA; take native.")
        values["lora_alpha"] = int(values["lora_alpha"])
        values["lora_dropout"] = float(values["lora_dropout"]) or _SMALLEST_DROPOUT
        torch.save(dict(sorted(load_file(source / WEIGHTS).items())), target / "adapter_model.bin")
    else:
        (target / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes())
    _write_json(values, target / CONFIG)
    if (source / CARD).exists():
        (target / CARD).write_bytes((source / CARD).read_bytes())


def _write_json(values: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
