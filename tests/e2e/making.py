"""Small jobs for a tiny base."""

import json
from pathlib import Path
from typing import Any

from mixloom import Client

MIXTURE = {"method": "mixlora", "rank": 4, "num_experts": 4, "top_k": 2}
WIDE = {"method": "mixlora", "rank": 8, "num_experts": 2, "top_k": 1, "dropout": 0.2}
PLAIN = {"method": "lora", "rank": 8}
NARROW = {"method": "lora", "rank": 2, "target_modules": ["q_proj", "down_proj"]}


def dataset(client: Client, folder: Path, *, rows: int = 10, word: str = "What") -> str:
    """The id of a data set of short rows, each different."""
    path = folder / f"{word}-{rows}.jsonl"
    lines = ({"prompt": f"{word} is {n:03}?", "completion": f"It is {n:03}."} for n in range(rows))
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return str(client.datasets.upload(path)["id"])


def submit(client: Client, data: str, adapter: dict[str, Any], steps: int, **fields: Any) -> str:
    """The id of a new job of so many steps of two rows each."""
    training = {"max_steps": steps, "batch_size": 2, "learning_rate": 5e-3, **fields.pop("training", {})}
    return str(client.jobs.submit(dataset=data, adapter=adapter, training=training, **fields)["id"])
