"""What a job is to train on, in the words of a command line or a YAML file. Knows no server."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mixloom.cli.output import usage_error
from mixloom.transport import Object


@dataclass(frozen=True)
class Part:
    """A file of rows or a data set, `ds_…`; one of several has a weight, or none of them."""

    data: str
    weight: float | None = None
    columns: dict[str, str] = field(default_factory=dict)


def weighted(parts: list[Part], weights: list[float]) -> list[Part]:
    """The parts with the weights that flags give, in their order; flags win over a YAML file."""
    if not weights:
        return parts
    if len(weights) != len(parts):
        raise usage_error(
            f"--weight is given once for each of several data sets; here are {len(weights)} for {len(parts)}."
        )
    return [replace(part, weight=weight) for part, weight in zip(parts, weights, strict=True)]


def parts_of_yaml(config: Object, folder: Path) -> list[Part]:
    """Takes `data` and `columns` out of a YAML job; a path in it counts from the YAML file's folder."""
    data, columns = config.pop("data", None), config.pop("columns", {})
    sets = config.get("dataset", [])
    if not all(_is_id(one) for one in (sets if isinstance(sets, list) else [sets])):
        raise usage_error("`dataset` is as in the API: ds_…, or a list of {id, weight}. Files are named under `data`.")
    if data is None:
        return []
    return [_part(one, columns, folder) for one in (data if isinstance(data, list) else [data])]


def _is_id(dataset: Any) -> bool:
    id_ = dataset.get("id") if isinstance(dataset, dict) else dataset
    return isinstance(id_, str) and id_.startswith("ds_")


def _part(value: Any, columns: dict[str, str], folder: Path) -> Part:
    fields = value if isinstance(value, dict) else {"data": value}
    if not isinstance(fields.get("data"), str) or fields.keys() - {"data", "weight", "columns"}:
        raise usage_error(
            f"`data` is a file, a data set, or a list of these or of {{data, weight, columns}}; it cannot be {value!r}."
        )
    source = fields["data"]
    path = source if source.startswith("ds_") else str(folder / source)
    return Part(path, fields.get("weight"), fields.get("columns", columns))
