"""A base for the benchmarks' own contenders, whose LoRA of rank 80 needs some width."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.base_folder import write_tiny_base


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, as narrow as a LoRA of rank 80 allows; its loss differs from token to token."""
    folder = write_tiny_base(tmp_path_factory.mktemp("base"))
    sizes = {"hidden_size": 96, "intermediate_size": 96, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = AutoConfig.for_model("llama", num_hidden_layers=2, vocab_size=512, max_position_embeddings=256, **sizes)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(6)
    model.save_pretrained(folder)
    return folder
