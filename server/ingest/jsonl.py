"""JSON Lines: one object a line; blank lines are passed over."""

from collections.abc import Iterator
from pathlib import Path

from server import strict_json
from server.errors import Detail
from server.ingest.records import Record, lines_of


def read_jsonl(path: Path) -> Iterator[Record | Detail]:
    """The records of a file, and a Detail for each line that is none."""
    for line in lines_of(path):
        if line.flaw:
            yield line.flaw
        elif line.text.strip():
            try:
                values = strict_json.parse(line.text)
            except ValueError as error:
                yield Detail(line=line.number, message=str(error))
                continue
            if isinstance(values, dict):
                yield Record(line.number, values)
            else:
                yield Detail(line=line.number, message="is not an object; each line must be one, {...}")
