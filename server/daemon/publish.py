"""Tell the API of the base: a row of `bases`, and a folder with what rendering needs."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine.base_model import BaseModel, Fingerprint
from engine.errors import EngineError
from engine.exactness import failing_facts
from engine.memory import BaseMemory
from server.db.tables import Base
from server.settings import Settings
from server.store import LocalStore, is_whole, manifest_of


def read_tokenizer(base: BaseModel, source: Path, settings: Settings) -> dict[str, bytes]:
    """What rendering needs, as files by name; the operator's own chat template takes the place of the base's.

    Raises:
        EngineError: the base has no fast tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise EngineError(f"The tokenizer of the base in '{source}' cannot be read: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise EngineError(f"The base '{base.name}' has no tokenizer.json; convert its tokenizer first.")
    template = settings.chat_template.read_text() if settings.chat_template else tokenizer.chat_template
    special = {
        "eos_token": tokenizer.eos_token,
        "eos_id": tokenizer.eos_token_id,
        "bos_token": tokenizer.bos_token,
        "bos_id": tokenizer.bos_token_id,
        "add_bos": tokenizer.bos_token_id is not None and tokenizer("x").input_ids[0] == tokenizer.bos_token_id,
    }

    texts = {"tokenizer.json": tokenizer.backend_tokenizer.to_str(), "special.json": json.dumps(special)}
    if template:
        texts["chat_template.jinja"] = template
    return {name: text.encode() for name, text in texts.items()}


def publish_tokenizer(store: LocalStore, base: BaseModel, files: Mapping[str, bytes]) -> str:
    """Write `bases/<hash>/` unless it is there: an API that lives may be reading it. Its key."""

    def write(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).write_bytes(content)

    key = _key(base)
    if not is_whole(store.path(key), manifest_of(files)):
        store.put(key, write)
    return key


def _key(base: BaseModel) -> str:
    return f"bases/{base.hash}"


def base_row(
    base: BaseModel, *, source: Path, tokenizer: Mapping[str, bytes], probed: dict[str, float], memory: BaseMemory
) -> Base:
    """What the API may know of the base."""
    return Base(
        hash=base.hash,
        name=base.name,
        path=str(source),
        folder_key=_key(base),
        dtype=str(base.dtype).removeprefix("torch."),
        context=base.context,
        microbatch_tokens=base.microbatch_tokens,
        parameters=base.num_parameters,
        num_layers=base.num_layers,
        targets={module: list(shape) for module, shape in base.shapes.items()},
        fingerprint=asdict(Fingerprint.of(base)),
        probe={
            "gigaflops": probed,
            "exact": "to rounding" if (failing := failing_facts(base)) else "bitwise",
            "failing_facts": failing,
        },
        published_at=time.time(),
        activation=base.activation_name,
        memory=asdict(memory),
        manifest=manifest_of(tokenizer),
    )
