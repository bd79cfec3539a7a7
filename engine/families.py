"""The table of architectures: a new one costs an entry. Names are those of transformers' modules."""

from dataclasses import dataclass

from engine.errors import UnsupportedBase


@dataclass(frozen=True)
class Family:
    """Where the linear modules of a decoder layer sit, and which of them read the same input."""

    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    @property
    def mlp(self) -> tuple[str, ...]:
        return (self.gate, self.up, self.down)

    def input_of(self, module: str) -> str:
        """The name of a module's input: modules with the same input share one dropout mask."""
        if module in self.mlp:
            return "down_input" if module == self.down else "mlp_input"
        return "attention_output" if module == self.attention[-1] else "attention_input"


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma": Family(),
    "gemma2": Family(),
}


def family_of(model_type: str) -> Family:
    """The entry of an architecture.

    Raises:
        UnsupportedBase: the architecture is not in the table.
    """
    if model_type not in FAMILIES:
        raise UnsupportedBase(f"The architecture '{model_type}' is not supported; take one of {', '.join(FAMILIES)}.")
    return FAMILIES[model_type]
