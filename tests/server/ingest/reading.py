"""Shorthand for tests of files: what reads one, and how to write some."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from server.errors import MixloomError
from server.ingest.file import format_of, ingest
from server.render import Renderer


class Reader:
    """Ingests one file after another, and remembers nothing of them."""

    def __init__(self, folder: Path, renderer: Renderer):
        self.content, self.rows, self.renderer = folder / "content", folder / "rows.jsonl", renderer
        self.shape = ""
        self.lengths = np.empty(0)

    def __call__(self, data: bytes | str, name: str = "data.jsonl", **columns: str) -> list[dict[str, Any]]:
        self.content.write_bytes(data.encode() if isinstance(data, str) else data)
        form = format_of(self.content, name)
        self.shape, self.lengths = ingest(self.content, self.rows, form, columns, self.renderer)
        return [json.loads(line) for line in self.rows.read_text().splitlines()]

    def refusal(self, data: bytes | str, name: str = "data.jsonl", **columns: str) -> MixloomError:
        with pytest.raises(MixloomError) as caught:
            self(data, name, **columns)
        return caught.value


def jsonl(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_parquet(path: Path, **columns: Any) -> bytes:
    pq.write_table(pa.table(columns), path)
    return path.read_bytes()


GOOD = {"prompt": "a", "completion": "b"}
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
