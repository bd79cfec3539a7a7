"""Tell the API of the base: a row of `bases`, and a folder with what rendering needs."""

import json
import time
from dataclasses import asdict
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine.base_model import BaseModel, Fingerprint
from engine.errors import EngineError
from engine.exactness import failing_facts
from engine.memory import BaseMemory
from server.db.tables import Base
from server.settings import Settings
from server.store import LocalStore, Manifest, is_whole, manifest_of


def publish_tokenizer(store: LocalStore, base: BaseModel, source: Path, settings: Settings) -> tuple[str, Manifest]:
    """Write `bases/<hash>/`; the operator's own chat template takes the place of the base's. Its key and its files.

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
    contents = {name: text.encode() for name, text in texts.items()}

    def write(folder: Path) -> None:
        for name, content in contents.items():
            (folder / name).write_bytes(content)

    key, files = f"bases/{base.hash}", manifest_of(contents)
    if not is_whole(store.path(key), files):
        store.put(key, write)  # not at every start: an API that lives may be reading it
    return key, files


def base_row(
    base: BaseModel, *, source: Path, folder_key: str, manifest: Manifest, probed: dict[str, float], memory: BaseMemory
) -> Base:
    """What the API may know of the base."""
    return Base(
        hash=base.hash,
        name=base.name,
        path=str(source),
        folder_key=folder_key,
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
        manifest=manifest,
    )
