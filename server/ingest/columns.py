"""Which columns of a file make a row: recognised, renamed as asked, or guessed for the error that asks for
it.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from server.errors import Detail, MixloomError
from server.ingest.records import MAX_DETAILS, Record, invalid_rows
from server.shapes import OPTIONAL, SHAPES

_PROMPTS = (
    "prompt",
    "instruction",
    "question",
    "query",
    "input",
    "problem",
    "source",
    "user",
    "human",
    "request",
)
_COMPLETIONS = (
    *(
        "completion",
        "output",
        "answer",
        "response",
        "solution",
        "target",
        "label",
        "reply",
        "assistant",
        "summary",
    ),
    *("translation", "category", "result"),
)
_SHOWN_COLUMNS = 30


def recognise(records: Iterable[Record | Detail], columns: Mapping[str, str]) -> str:
    """The shape that most records of a file have once their columns are renamed.

    `columns`: our name -> the file's. Raises `unknown_columns`, `empty_dataset`, and `invalid_rows` where no
    line is a record at all.
    """
    shapes = _shapes_with(columns)
    fits: Counter[str] = Counter()
    is_text: dict[str, bool] = {}
    flaws: list[Detail] = []
    for record in records:
        if isinstance(record, Detail):
            flaws += [record][: MAX_DETAILS - len(flaws)]
            continue
        for name, value in record.values.items():
            is_text[name] = is_text.get(name, True) and isinstance(value, str | None)
        values = renamed(record.values, columns)
        fits.update(shape for shape in shapes if all(values.get(name) is not None for name in SHAPES[shape]))
    if not is_text:
        raise invalid_rows(flaws) if flaws else _empty_dataset()
    if not fits or not set(columns.values()) <= set(is_text):
        raise _unknown_columns(is_text, columns)
    return max(shapes, key=lambda shape: fits[shape])


def renamed(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A record under our names; columns that are not renamed stay, unless their name was given to another."""
    taken = {*columns, *columns.values()}
    ours = {ours: values[theirs] for ours, theirs in columns.items() if theirs in values}
    return ours | {name: value for name, value in values.items() if name not in taken}


def suggest(is_text: Mapping[str, bool]) -> dict[str, str] | None:
    """A renaming that would make rows of a file, by the usual names or else by its first columns of text."""
    texts = [name for name, text in is_text.items() if text]
    lowered = {name.strip().lower(): name for name in texts}
    prompt = next((lowered[name] for name in _PROMPTS if name in lowered), None)
    completion = next((lowered[name] for name in _COMPLETIONS if name in lowered), None)
    others = [name for name in texts if name not in (prompt, completion)]
    if completion is None and len(others) > (prompt is None):
        completion = others.pop(1 if prompt is None else 0)
    if prompt is None and completion is not None and others:
        prompt = others[0]
    if prompt is not None and completion is not None:
        return {"prompt": prompt, "completion": completion}
    return {"text": texts[0]} if texts else None


def _shapes_with(columns: Mapping[str, str]) -> list[str]:
    """The shapes that have all columns that are renamed. Raises `invalid_columns`."""
    names_of = {shape: (*names, *OPTIONAL.get(shape, ())) for shape, names in SHAPES.items()}
    shapes = [shape for shape, names in names_of.items() if set(columns) <= set(names)]
    if not shapes:
        raise MixloomError(
            "invalid_columns",
            f"'columns' gives the names {_listed(columns)}. It may give those of one kind of rows: "
            f"{'; '.join(', '.join(names) for names in names_of.values())}.",
            param="columns",
        )
    return shapes


def _empty_dataset() -> MixloomError:
    return MixloomError("empty_dataset", "The file has no rows. Upload one with a row or more.", param="file")


def _unknown_columns(is_text: Mapping[str, bool], columns: Mapping[str, str]) -> MixloomError:
    absent = [theirs for theirs in columns.values() if theirs not in is_text]
    said = f"there is no column {_listed(absent)}" if absent else "these columns make no row as they are"
    suggestion = suggest(is_text)
    action = (
        f"Send columns={json.dumps(suggestion, ensure_ascii=False)}, if that is what they mean"
        if suggestion
        else "Give rows of messages, of prompt and completion, of instruction, input and output, or of text"
    )
    return MixloomError(
        "unknown_columns", f"The file has the columns {_listed(is_text)}: {said}. {action}.", param="columns"
    )


def _listed(names: Iterable[str]) -> str:
    every = [f"'{name}'" for name in names]
    return ", ".join(every[:_SHOWN_COLUMNS]) + (", …" if len(every) > _SHOWN_COLUMNS else "")
