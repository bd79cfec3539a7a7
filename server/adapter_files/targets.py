"""A list of `target_modules` as PEFT reads it: names of modules, ends of their paths, or whole paths."""

from collections import defaultdict
from collections.abc import Sequence

from server.db.tables import Base
from server.resolve import FEED_FORWARD


def targets_of(asked: Sequence[str], base: Base) -> list[str]:
    """The base's modules that a list means. What matches nothing is left as it is, for the caller to refuse.

    PEFT itself saves `all-linear` as the path of every module. Raises ValueError naming a module that is meant in
    some layers only.
    """
    if all(name in base.targets for name in asked):
        return list(asked)
    meant = defaultdict(set)
    paths = {_path(layer, target): (layer, target) for layer in range(base.num_layers) for target in base.targets}
    by_end = defaultdict(list)
    for path, place in paths.items():
        parts = path.split(".")
        for start in range(len(parts)):
            by_end[".".join(parts[start:])].append(place)
    for name in asked:
        for layer, target in by_end.get(name, ()):
            meant[target].add(layer)
    for target, layers in meant.items():
        if len(layers) < base.num_layers:
            raise ValueError(f"it names '{target}' in {len(layers)} of {base.num_layers} layers; all or none are taken")
    return [*(target for target in base.targets if target in meant), *(name for name in asked if name not in by_end)]


def _path(layer: int, target: str) -> str:
    return f"model.layers.{layer}.{block_of(target)}.{target}"


def block_of(target: str) -> str:
    """The part of a layer that a module is in."""
    return "mlp" if target in FEED_FORWARD else "self_attn"
