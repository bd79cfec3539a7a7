"""CSV: a header, then records, separated by commas, semicolons or tabs. Every value is a text."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from server.errors import Detail
from server.ingest.records import Record, lines_of

DELIMITERS = ",;\t"
_SAMPLE_BYTES = 2**16

csv.field_size_limit(2**31 - 1)  # the size of an upload is what bounds a field


def read_csv(path: Path) -> Iterator[Record | Detail]:
    """The records of a file, each with the line that it begins at, and a Detail for what is none."""
    flaws: list[Detail] = []
    reader = csv.reader(_texts(path, flaws), delimiter=sniff_delimiter(path), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            yield from flaws
            return
        except csv.Error as error:
            yield Detail(line=line, message=_explain(error))
            continue
        if flaws:
            yield from flaws
            flaws.clear()
        elif not fields:
            continue
        elif header is None:
            header = [name.strip() for name in fields]
            twice = next((name for name in header if header.count(name) > 1), None)
            if twice is not None:
                yield Detail(line=line, column=twice, message="is the name of two columns; rename one")
                return
        elif len(fields) != len(header):
            said = f"has {len(fields)} fields, the header has {len(header)}"
            yield Detail(line=line, message=f"{said}; quote fields that hold the delimiter")
        else:
            yield Record(line, dict(zip(header, fields, strict=True)))


def sniff_delimiter(path: Path) -> str:
    """The delimiter under which the header has several columns and most records have as many as it."""
    with path.open("rb") as file:
        sample = file.read(_SAMPLE_BYTES).decode("utf-8-sig", errors="replace")

    def score(delimiter: str) -> tuple[bool, float]:
        rows = csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter)
        widths = [len(fields) for fields in rows if fields] or [0]
        return widths[0] > 1, widths.count(widths[0]) / len(widths)

    return max(DELIMITERS, key=score)


def _texts(path: Path, flaws: list[Detail]) -> Iterator[str]:
    """The lines for the csv module; what is not UTF-8 in them goes to `flaws`."""
    for line in lines_of(path):
        if line.flaw:
            flaws.append(line.flaw)
        yield line.text


def _explain(error: csv.Error) -> str:
    if "unexpected end of data" in str(error):
        return "opens a quoted field that is never closed; close it, or double a quote of the text"
    return f"is not CSV: {error}"
