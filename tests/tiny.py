"""A byte-level tokenizer of some 270 tokens in the folder of a base: small, and able to write any text."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = [
    "Ċ Ċ",
    "Ċ t",
    "Ġ t",
    "h e",
    "Ġt he",
    "i n",
    "e r",
    "o n",
    "a n",
    "r e",
    "Ġ a",
    "u s",
    "us er",
    "? Ċ",
]
"""Some join what stands on both sides of a turn's border (two line breaks), so that a test can see it."""

CHAT_TEMPLATE = """\
{%- if messages and messages[0].role != "system" %}
<|im_start|>system
Be brief.<|im_end|>
{% endif %}
{%- for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""
"""ChatML, with a system turn of the template's own."""


def tiny_tokenizer() -> Tokenizer:
    """3 special tokens, 256 bytes and a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(left, right) for left, right in (merge.split(" ") for merge in MERGES)]
    tokens = [*SPECIAL_TOKENS, *alphabet, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: id_ for id_, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def write_tiny_tokenizer(
    folder: Path, template: bool | str = True, *, add_bos: bool = False, bos_token: str = "<|endoftext|>"
) -> Tokenizer:
    """What a daemon publishes of a base: `tokenizer.json`, `special.json`, and a chat template (False: none).

    Chat models end with `<|im_end|>`, others with `<|endoftext|>`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    eos_token = "<|im_end|>" if template else "<|endoftext|>"
    special = {
        "eos_token": eos_token,
        "eos_id": tokenizer.token_to_id(eos_token),
        "bos_token": bos_token,
        "bos_id": tokenizer.token_to_id(bos_token),
        "add_bos": add_bos,
    }
    (folder / "special.json").write_text(json.dumps(special))
    if template:
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE if template is True else template)
    return tokenizer
