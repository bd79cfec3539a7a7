"""A tiny random base as a folder, the way `mixloom serve --base FOLDER` takes one."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.models import tiny_config, tiny_model
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer


def write_tiny_base(folder: Path, *, seed: int = 7, template: bool = True) -> Path:
    """Weights, config and tokenizer; another `seed` gives other weights, and so another base."""
    if seed == 7:
        model = tiny_model()
    else:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config())
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer(),
        eos_token="<|im_end|>" if template else "<|endoftext|>",
        bos_token="<|endoftext|>",
    )
    if template:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder
