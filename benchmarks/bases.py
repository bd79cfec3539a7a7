"""What contenders have in common: the frozen base and how adapters are trained on it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine import base_model
from engine.base_model import BaseModel
from engine.config import AdapterConfig
from engine.engine import Engine
from engine.families import family_of
from engine.run import Run

LEARNING_RATE = 1e-4
MAX_GRAD_NORM = 1.0
DROPOUT = 0.05
MIXLORA = {"rank": 16, "alpha": 32.0, "num_experts": 8, "top_k": 2, "router_aux_loss_coef": 1e-3}
LORA = {"rank": 80, "alpha": 160.0}
"""The paper's baseline with about as many parameters as MIXLORA."""
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", **LORA},
    "dora": {"method": "lora", **LORA, "dora": True},
    "mixlora": {"method": "mixlora", **MIXLORA},
    "mixdora": {"method": "mixlora", **MIXLORA, "dora": True},
}
"""What our engine trains, by the name of its contender."""


@dataclass(frozen=True)
class Bases:
    """The frozen base, as each contender needs it: loaded when first asked for, and shared where it can be."""

    folder: Path
    dtype: str
    device: str
    jobs: int
    jobs_a_pass: int
    """Of our engine's contenders."""
    moe_peft: Path | None = None
    """The Python of an environment that has MoE-PEFT."""

    @cached_property
    def packed(self) -> BaseModel:
        """The engine's, for all contenders of ours."""
        dtype = getattr(torch, self.dtype)
        return base_model.load(self.folder, name=self.folder.name, dtype=dtype, device=self.device)

    def plain(self) -> PreTrainedModel:
        """Transformers' own, a new one at each call: PEFT replaces modules in it."""
        model = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=getattr(torch, self.dtype), attn_implementation="sdpa", local_files_only=True
        )
        model.to(torch.device(self.device))  # type: ignore[arg-type]
        return model.eval().requires_grad_(False)

    def runs(self, method: str) -> list[Run]:
        """One of each job; the same ones at each call."""
        if method not in self._runs:
            targets = target_modules(self.packed.model)
            config = AdapterConfig.from_dict({"dropout": DROPOUT, "target_modules": targets, **METHODS[method]})
            self._runs[method] = [Engine(self.packed).create_run(config, seed) for seed in range(self.jobs)]
        return self._runs[method]

    @cached_property
    def _runs(self) -> dict[str, list[Run]]:
        return {}


def target_modules(model: PreTrainedModel) -> tuple[str, ...]:
    """All linear modules of a layer, by name."""
    family = family_of(model.config.model_type)
    return family.attention + family.mlp
