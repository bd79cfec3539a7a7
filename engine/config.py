"""The configuration of one adapter. Knows no base model: whether it fits one is `BaseModel.check`'s to say."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from engine.errors import EngineError


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """LoRA, DoRA, MixLoRA or MixDoRA on some of the base's linear modules, the same in every layer."""

    method: Literal["lora", "mixlora"]
    rank: int
    alpha: float
    """Output is scaled by alpha / rank (rsLoRA: alpha / sqrt(rank))."""
    dropout: float = 0.0
    """Probability with which an element of an adapter's input is dropped while training."""
    rslora: bool = False
    dora: bool = False
    """Trains a magnitude for each output beside the direction (MixDoRA: for each expert)."""
    target_modules: tuple[str, ...]
    num_experts: int | None = None
    top_k: int | None = None
    router_aux_loss_coef: float | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise EngineError(f"rank must be 1 or more, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise EngineError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if not self.target_modules:
            raise EngineError("target_modules must name at least one module")
        if self.method == "mixlora":
            if not self.num_experts or not self.top_k or not 1 <= self.top_k <= self.num_experts:
                raise EngineError(f"1 <= top_k <= num_experts must hold, got {self.top_k} and {self.num_experts}")
            if self.router_aux_loss_coef is None:
                raise EngineError("mixlora needs a router_aux_loss_coef (0 turns the auxiliary loss off)")

    @property
    def scaling(self) -> float:
        """The factor s of docs/design.md §3."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def is_mixture(self) -> bool:
        return self.method == "mixlora"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "target_modules": list(self.target_modules)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AdapterConfig":
        return cls(**{**values, "target_modules": tuple(values["target_modules"])})
