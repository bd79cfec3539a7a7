"""How commands speak: results on stdout, for people or as JSON; all else on stderr. Knows no route."""

import json
import sys
import time
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mixloom.errors import MixloomError
from mixloom.transport import Object, Objects

JOB_NOT_SUCCEEDED = 1
USAGE = 2
UNREACHABLE = 3
REFUSED = 4
SERVER_ERROR = 5
INTERRUPTED = 130

stdout = Console(highlight=False, markup=False, soft_wrap=True)
stderr = Console(highlight=False, markup=False, soft_wrap=True, stderr=True)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def say(text: str) -> None:
    """A line of a result, as it is."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def print_json(value: Any) -> None:
    """One JSON document."""
    say(json.dumps(value, indent=2, ensure_ascii=False))


def print_json_line(value: Any) -> None:
    """One document of a stream."""
    say(json.dumps(value, ensure_ascii=False))


def print_table(columns: list[str], rows: Iterable[Iterable[Any]]) -> None:
    """A table on a terminal; elsewhere lines with tabs, which `cut` and `awk` can read."""
    texts = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    if not stdout.is_terminal:
        for line in [columns, *texts]:
            say("\t".join(line))
        return
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for line in texts:
        table.add_row(*line)
    stdout.print(table)


def print_object(value: Object, as_json: bool) -> None:
    """One object of the API: for programs, or for people."""
    if as_json:
        print_json(value)
    else:
        print_fields({name: field for name, field in value.items() if name != "object"})


def print_done(answer: Object | Objects, as_json: bool, sentence: str) -> None:
    """What a command that changes something leaves: the answer for programs, a sentence for people."""
    if as_json:
        print_json(answer)
    else:
        note(sentence)


def print_fields(fields: Object) -> None:
    """One line a field; a dict becomes `key value, key value`. What is None is left out."""
    shown = {name: _text(value) for name, value in _with_moments(fields).items() if value not in (None, {}, [])}
    width = max(map(len, shown), default=0)
    for name, text in shown.items():
        say(f"{name:<{width}}  {text}")


def note(sentence: str) -> None:
    """Something a person should know, which is no result."""
    stderr.print(sentence)


def usage_error(sentence: str) -> typer.Exit:
    """Say what is wrong with the command line; raise what this gives."""
    note(f"error: {sentence}")
    return typer.Exit(USAGE)


def report(error: MixloomError) -> int:
    """One sentence, a line for each bad place; the exit code that fits."""
    note(f"error: {error.message}")
    for detail in error.details:
        place = f"line {detail['line']}" if detail["line"] else ""
        column = f"'{detail['column']}'" if detail["column"] else ""
        note(f"  {', '.join(filter(None, (place, column)))}: {detail['message']}")
    if error.status is None:
        return UNREACHABLE
    return REFUSED if error.status < 500 else SERVER_ERROR


def moment(seconds: float | None) -> str | None:
    """Unix seconds as local time."""
    return None if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _with_moments(fields: Object) -> Object:
    return {name: moment(value) if name.endswith("_at") else value for name, value in fields.items()}


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in _with_moments(value).items() if item is not None)
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
