"""The one frozen base model: transformers' own causal LM with three replacements (docs/design.md §3).

Replaced are its attention's linear modules, its gated MLPs and its attention function; all else runs as it is.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine import attention, heap, lanes, mkl
from engine.adapter import Adapter, Layout
from engine.config import AdapterConfig
from engine.errors import EngineError
from engine.families import family_of
from engine.feed_forward import PackedFeedForward
from engine.lora import LoraLinear
from engine.passes import Pass
from engine.recompute import Recompute
from engine.segments import Batch


class BaseModel:
    """A frozen causal LM over which adapters are trained: no gradient, no write, no optimizer state."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        name: str,
        hash_: str,
        microbatch_tokens: int = 1024,
        recompute: bool = False,
    ):
        """`model` is taken over: frozen, and its modules replaced.

        `recompute`: whether passes run each decoder layer a second time rather than keep what it made.

        Raises:
            UnsupportedBase: the architecture is not in the table of families.
        """
        self.family = family_of(model.config.model_type)
        self.name = name
        self.hash = hash_
        self.model = model.eval().requires_grad_(False)
        self.config = model.config.get_text_config()
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.num_layers: int = self.config.num_hidden_layers
        self.num_parameters: int = sum(p.numel() for p in model.parameters())
        self.context: int = self.config.max_position_embeddings
        self.activation_name: str = getattr(self.config, "hidden_activation", None) or self.config.hidden_act
        self.microbatch_tokens = microbatch_tokens
        self.recompute = recompute
        self.shapes: dict[str, tuple[int, int]] = {}
        self.linears: dict[tuple[int, str], LoraLinear] = {}
        self.pass_ = Pass()
        self.model.set_attn_implementation(attention.register(self.pass_))
        for index, layer in enumerate(self.model.model.layers):
            self._replace(index, layer)

    def _replace(self, index: int, layer: nn.Module) -> None:
        for module in self.family.attention:
            frozen = getattr(layer.self_attn, module)
            self.shapes[module] = tuple(frozen.weight.shape)
            linear = LoraLinear(frozen, self.pass_, index, module, self.family.input_of(module))
            setattr(layer.self_attn, module, linear)
            self.linears[index, module] = linear
        for module in self.family.mlp:
            self.shapes[module] = tuple(getattr(layer.mlp, module).weight.shape)
        feed_forward = PackedFeedForward(layer.mlp, self.family, self.pass_, index)  # type: ignore[arg-type]
        layer.mlp = feed_forward
        for linear in (feed_forward.gate, feed_forward.up, feed_forward.down):
            self.linears[index, linear.module] = linear
        if self.recompute:
            layer.forward = Recompute(layer.forward, self.pass_, index)

    def check(self, config: AdapterConfig) -> None:
        """Whether an adapter fits this base.

        Raises:
            EngineError: a target matches no module, the rank is too large, or a mixture has nothing to route.
        """
        for module in config.target_modules:
            if module not in self.shapes:
                raise EngineError(f"target module '{module}' matches nothing; this base has {', '.join(self.shapes)}")
            if config.rank > min(self.shapes[module]):
                raise EngineError(f"rank {config.rank} is above {min(self.shapes[module])}, the width of '{module}'")
        if config.is_mixture and not set(config.target_modules) & set(self.family.mlp):
            raise EngineError(f"mixlora needs a feed-forward target: one of {', '.join(self.family.mlp)}")

    def layout(self, config: AdapterConfig) -> Layout:
        return Layout(config, self.family, self.shapes, self.num_layers)

    def input_widths(self, config: AdapterConfig) -> dict[str, int]:
        """Of what a layer's modules read, by the input's name; each of K experts' down reads its own."""
        widths = {self.family.input_of(module): width for module, (_, width) in self.shapes.items()}
        if config.top_k is not None:
            widths[self.family.input_of(self.family.down)] *= config.top_k
        return widths

    def initialize_magnitudes(self, adapter: Adapter) -> None:
        """DoRA's m begins as the norm of the frozen weight's rows, so that the adapter begins as the base."""
        for slot in adapter.layout.slots.values():
            if slot.matrix == "m":
                slot.view(adapter.flat).copy_(self.linears[slot.layer, slot.module].frozen_norm_O)

    def hidden_states(self, batch: Batch) -> Tensor:
        """The normed last hidden states [T, D] of the pass under way."""
        outputs = self.model.model(input_ids=batch.tokens[None], position_ids=batch.positions[None], use_cache=False)
        return outputs.last_hidden_state[0]

    def head(self, hidden_nD: Tensor) -> Tensor:
        """Logits [n, V]."""
        logits = self.model.lm_head(hidden_nD)
        softcap = getattr(self.config, "final_logit_softcapping", None)
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def hash_of(folder: Path) -> str:
    """sha256 over the weights (safetensors files, by name) and config.json of a model folder."""
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def load(
    folder: Path,
    *,
    name: str,
    dtype: torch.dtype,
    device: str,
    microbatch_tokens: int = 1024,
    recompute: bool = False,
) -> BaseModel:
    """Load a local folder of safetensors; code and pickles in it are never run.

    Raises:
        EngineError: the folder holds no such model.
    """
    if not list(folder.glob("*.safetensors")):
        raise EngineError(f"'{folder}' holds no *.safetensors; convert the model first (pickles are never loaded)")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise EngineError(f"The model in '{folder}' cannot be read: {error}") from error
    model, report = loaded
    if missing := report["missing_keys"]:  # transformers would fill them with random numbers
        raise EngineError(f"The model in '{folder}' lacks {len(missing)} tensors, '{min(missing)}' among them.")
    model.to(torch.device(device))
    if device == "cpu":
        heap.keep_freed()
        lanes.hand_over_soon()
    return BaseModel(model, name=name, hash_=hash_of(folder), microbatch_tokens=microbatch_tokens, recompute=recompute)


NUMERICS = 4
"""Of the engine: the next number wherever a change of it changes the bits of a result."""


@dataclass(frozen=True)
class Fingerprint:
    """What the bits of a result depend on besides the job itself (docs/design.md §2.1)."""

    torch: str
    transformers: str
    numpy: str
    numba: str
    dtype: str
    device: str
    capability: str
    threads: int
    numerics: int

    @classmethod
    def of(cls, base: BaseModel) -> "Fingerprint":
        import transformers

        cuda = base.device.type == "cuda"
        return cls(
            torch=torch.__version__,
            transformers=transformers.__version__,
            numpy=np.__version__,
            numba=numba.__version__,
            dtype=str(base.dtype).removeprefix("torch."),
            device=base.device.type,
            capability=torch.cuda.get_device_name() if cuda else _cpu_capability(),
            threads=torch.get_num_threads(),
            numerics=NUMERICS,
        )


def _cpu_capability() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{capability}, MKL {mkl.mode()}" if mkl.mode() else capability


@contextmanager
def input_gradient(model: nn.Module) -> Iterator[None]:
    """Ask for the gradient at the embeddings, which makes the whole backward run though no weight is trained."""
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    handle = embeddings.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
    try:
        yield
    finally:
        handle.remove()
