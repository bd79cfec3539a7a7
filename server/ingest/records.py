"""What every reader of a file yields: records with the line that they begin at, or what is wrong there."""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.errors import Detail, MixloomError

MAX_DETAILS = 20
"""Bad lines that an answer names."""


@dataclass(frozen=True)
class Record:
    """One row as the file has it. `line` counts from 1; in a Parquet file, which has none, it counts rows."""

    line: int
    values: dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One line of a text file, its end included. `flaw` says what is not UTF-8 in it."""

    number: int
    text: str
    flaw: Detail | None


def lines_of(path: Path) -> Iterator[Line]:
    """The lines of a UTF-8 file, the byte order mark left out; bad bytes are replaced and said."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            try:
                yield Line(number, content.decode(), None)
            except UnicodeDecodeError as error:
                offset = start + len(line) - len(content) + error.start
                said = f"is not UTF-8: byte 0x{content[error.start]:02x} at offset {offset}"
                flaw = Detail(line=number, message=f"{said}; save the file as UTF-8")
                yield Line(number, content.decode(errors="replace"), flaw)
            start += len(line)


def invalid_rows(flaws: Sequence[Detail]) -> MixloomError:
    """The refusal of a whole file for its bad lines, the first MAX_DETAILS of which are named."""
    first = flaws[0]
    where = f"line {first.line}" + (f", column '{first.column}'" if first.column else "")
    many = f"{MAX_DETAILS} or more" if len(flaws) >= MAX_DETAILS else str(len(flaws))
    number = "1 row is" if len(flaws) == 1 else f"{many} rows are"
    return MixloomError(
        "invalid_rows",
        f"{number} bad, so nothing was kept: {where} {first.message}. Correct the file and upload it again.",
        param="file",
        details=list(flaws[:MAX_DETAILS]),
    )
