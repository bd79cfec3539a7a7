"""What a row must be, and what is wrong with one that is none."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server import strict_json
from server.ingest.columns import renamed
from server.shapes import OPTIONAL, ROLES, SHAPES, shape_of

Flaw = tuple[str, str]
"""(column, what is wrong with it: the rest of a sentence)."""

_FLAGS = {"True": True, "true": True, "TRUE": True, "False": False, "false": False, "FALSE": False}
_TYPES = {
    str: "text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


@dataclass(frozen=True)
class Layout:
    """How the records of one file become rows: their shape, and of renamed columns our name -> the file's."""

    shape: str
    columns: Mapping[str, str]

    def row(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A record as a row: columns renamed, others kept, but for one that would give it another shape."""
        row = renamed(values, self.columns)
        while (shape := shape_of(row)) not in (None, self.shape):
            del row[SHAPES[shape][-1]]
        if isinstance(row.get("raw"), str):  # a CSV file has nothing but texts
            row["raw"] = _FLAGS.get(row["raw"], row["raw"])
        return row

    def flaw(self, row: Mapping[str, Any]) -> Flaw | None:
        """The first thing wrong with a row, its column named as in the file; None for a good row."""
        found = _value_flaw(row) or self._raw_flaw(row) or self._shape_flaw(row)
        return (self.columns.get(found[0], found[0]), found[1]) if found else None

    def _raw_flaw(self, row: Mapping[str, Any]) -> Flaw | None:
        if row.get("raw") not in (None, True, False):
            return "raw", "must be true or false: whether the template is left out; else rename the column"
        if row.get("raw") and self.shape == "messages":
            return "raw", "is true, but only a template can write messages"
        return None

    def _shape_flaw(self, row: Mapping[str, Any]) -> Flaw | None:
        if self.shape == "messages":
            said = messages_flaw(row.get("messages"))
            return ("messages", said) if said else None
        for name in (*SHAPES[self.shape], *OPTIONAL.get(self.shape, ())):
            said = _text_flaw(row.get(name), may_be_empty=self.shape == "instruction" and name != "output")
            if said and not (name == "input" and row.get("input") is None):
                return name, said
        if self.shape == "instruction" and not (row["instruction"] + (row.get("input") or "")).strip():
            return "instruction", "is empty, and so is input"
        return None


def messages_flaw(messages: Any) -> str | None:
    """What is wrong with the messages of a training row (the rest of a sentence), or None."""
    if not isinstance(messages, list) or not messages:
        return "is missing" if messages is None else "must be a list of one message or more"
    for number, message in enumerate(messages, 1):
        if said := _message_flaw(message):
            return f"has a bad message, number {number}: {said}"
    if messages[0]["role"] == "assistant":
        return "begins with the assistant; a user or system message must come first"
    if not any(message["role"] == "assistant" and message.get("weight") != 0 for message in messages):
        return "has no assistant message to learn from; add one, or give one the weight 1"
    return None


def _message_flaw(message: Any) -> str | None:
    if not isinstance(message, dict):
        return "it must be an object with role and content"
    given = {name: value for name, value in message.items() if value is not None}
    unknown = next((name for name in given if name not in ("role", "content", "weight")), None)
    if unknown is not None:
        return f"it has '{unknown}', which is not supported; a message has role, content and weight"
    role = given.get("role")
    if role not in ROLES:
        return f"its role must be {', '.join(ROLES[:-1])} or {ROLES[-1]}, it is {role!r}"
    weight = given.get("weight")
    if weight is not None and (role != "assistant" or isinstance(weight, bool) or weight not in (0, 1)):
        return "its weight must be 0 or 1, and only the assistant's may have one"
    said = _text_flaw(given.get("content"), may_be_empty=role != "assistant" or weight == 0)
    return f"its content {said}" if said else None


def _value_flaw(row: Mapping[str, Any]) -> Flaw | None:
    for name, value in row.items():
        if said := strict_json.flaw(name) or strict_json.flaw(value):
            return name, said
    return None


def _text_flaw(value: Any, *, may_be_empty: bool) -> str | None:
    if value is None:
        return "is missing"
    if not isinstance(value, str):
        return f"must be text, it is {_TYPES[type(value)]}"
    return None if may_be_empty or value.strip() else "is empty"
