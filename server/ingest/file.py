"""An uploaded file, whole: its format, its rows checked and written down, the tokens of each counted."""

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from server.errors import Detail, MixloomError
from server.ingest.columns import recognise
from server.ingest.delimited import read_csv
from server.ingest.jsonl import read_jsonl
from server.ingest.parquet import read_parquet
from server.ingest.records import MAX_DETAILS, Record, invalid_rows
from server.ingest.rows import Layout
from server.render import Piece, Renderer, no_chat_template
from server.store import LocalStore

READERS: dict[str, Callable[[Path], Iterator[Record | Detail]]] = {
    "jsonl": read_jsonl,
    "csv": read_csv,
    "parquet": read_parquet,
    "hub": read_jsonl,  # as `server.hub` writes it
}
CHUNK_ROWS = 1000
HISTOGRAM_BINS = 20
CONTENT_FILE = "content"
ROWS_FILE = "rows.jsonl"
_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}


def format_of(path: Path, file_name: str) -> str:
    """The format of a file, by the end of its name, or else by how it begins."""
    by_name = _SUFFIXES.get(Path(file_name.lower()).suffix)
    if by_name:
        return by_name
    with path.open("rb") as file:
        head = file.read(1024)
    if head.startswith(b"PAR1"):
        return "parquet"
    return "jsonl" if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{") else "csv"


def ingest(
    content: Path, rows: Path, format: str, columns: Mapping[str, str], renderer: Renderer
) -> tuple[str, np.ndarray]:
    """Check every record of `content` and write it to `rows`, one JSON object a line; all or nothing.

    Returns (the shape of the rows, the tokens of each as int64 [rows]). `columns`: our name -> the file's.

    Reads the file twice, a chunk at a time. Raises MixloomError `empty_dataset`, `unknown_columns`,
    `invalid_columns`, `invalid_rows`, `unreadable_file`, `dataset_too_large`, `no_chat_template`.
    """
    layout = Layout(recognise(READERS[format](content), columns), columns)
    if layout.shape == "messages" and not renderer.has_template:
        raise no_chat_template()
    lengths: list[int] = []
    flaws: list[Detail] = []
    records = READERS[format](content)
    with rows.open("w", encoding="utf-8") as file:
        while len(flaws) < MAX_DETAILS and (chunk := list(islice(records, CHUNK_ROWS))):
            pieces: list[list[Piece]] = []
            for record in chunk:
                settled = record if isinstance(record, Detail) else _settle(record, layout, renderer)
                if isinstance(settled, Detail):
                    flaws.append(settled)
                else:
                    file.write(settled[0] + "\n")
                    pieces.append(settled[1])
            lengths += [len(row.tokens) for row in renderer.tokenise(pieces, "all")]
    if flaws:
        raise invalid_rows(flaws)
    return layout.shape, np.array(lengths, dtype=np.int64)


def _settle(record: Record, layout: Layout, renderer: Renderer) -> tuple[str, list[Piece]] | Detail:
    """(a record as a line of JSON, its pieces), or what is wrong with it."""
    row = layout.row(record.values)
    if found := layout.flaw(row):
        return Detail(line=record.line, column=found[0], message=found[1])
    try:
        return json.dumps(row, ensure_ascii=False), renderer.pieces(row)
    except MixloomError as error:  # the template refuses this conversation
        return Detail(line=record.line, column=error.param, message=f"cannot be rendered: {error.message}")


def histogram(lengths: np.ndarray) -> dict[str, list[int]]:
    """Rows by their tokens: `counts[i]` rows have `edges[i]` tokens or more and fewer than `edges[i + 1]`."""
    low, high = int(lengths.min()), int(lengths.max())
    width = (high - low) // HISTOGRAM_BINS + 1
    edges = np.arange(low, high + width + 1, width)
    return {"edges": edges.tolist(), "counts": np.histogram(lengths, edges)[0].tolist()}


def read_rows(store: LocalStore, dataset_id: str, start: int = 0, stop: int | None = None) -> list[dict[str, Any]]:
    """The rows of a data set, or those from `start` up to `stop`."""
    with (store.path(f"datasets/{dataset_id}") / ROWS_FILE).open(encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, start, stop)]
