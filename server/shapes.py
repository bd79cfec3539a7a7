"""The shapes that a row of a data set may have. Knows no file format and no tokenizer."""

from collections.abc import Mapping
from typing import Any

SHAPES: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
"""Name of a shape -> the columns it needs. A row that has several shapes is read as the first of them."""

OPTIONAL: dict[str, tuple[str, ...]] = {"instruction": ("input",)}
"""Columns that a shape reads when they are there."""

ROLES = ("system", "user", "assistant")


def shape_of(row: Mapping[str, Any]) -> str | None:
    """The shape of a row; a column that is null counts as absent."""
    for shape, names in SHAPES.items():
        if all(row.get(name) is not None for name in names):
            return shape
    return None


def prompt_and_completion(row: Mapping[str, Any]) -> tuple[str, str]:
    """The two texts of a `prompt_completion` or `instruction` row: instruction and input make one prompt."""
    if shape_of(row) == "prompt_completion":
        return row["prompt"], row["completion"]
    return "\n\n".join(part for part in (row["instruction"], row.get("input")) if part), row["output"]
