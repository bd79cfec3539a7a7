"""JSON read strictly: what Python lets pass and other readers, or a database, would choke on is refused."""

import datetime
import decimal
import json
import math
import re
from typing import Any

MAX_DEPTH = 32
_NUMBER_DIGITS = 40
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def parse(text: str) -> Any:
    """The value of a JSON text. Raises ValueError with a sentence: not JSON, NaN, Infinity, an endless
    number, a key twice, nested without end.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_each_key_once, parse_constant=_no_constant, parse_int=_bounded_integer
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at character {error.colno}") from None
    except RecursionError:
        raise ValueError(f"is nested more than {MAX_DEPTH} deep") from None


def flaw(value: Any, depth: int = 0) -> str | None:
    """What makes a parsed value unfit to be kept as JSON and UTF-8 (the rest of a sentence), or None."""
    if isinstance(value, str):
        found = _UNSTORABLE.search(value)
        return f"holds U+{ord(found[0]):04X}, which is no character of a text" if found else None
    if isinstance(value, float) and not math.isfinite(value):
        return f"holds {value}, which is not a number"
    if isinstance(value, dict | list):
        if depth == MAX_DEPTH:
            return f"is nested more than {MAX_DEPTH} deep"
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return next((said for part in parts if (said := flaw(part, depth + 1))), None)
    if value is None or isinstance(value, bool | int | float):
        return None
    return f"holds {type(value).__name__}, which JSON does not have"


def plain(value: Any) -> Any:
    """A value of a table in the types of JSON, where there is a usual way to write it; others as they are."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"has the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return mapping


def _no_constant(name: str) -> None:
    raise ValueError(f"holds {name}, which is not JSON")


def _bounded_integer(digits: str) -> int:
    if len(digits) > _NUMBER_DIGITS:
        raise ValueError(f"holds a number of {len(digits)} digits; {_NUMBER_DIGITS} are the most")
    return int(digits)
