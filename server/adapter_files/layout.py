"""Which tensors an adapter has on a base, under PEFT's and `mixlora`'s names; what of a file does not fit."""

from collections.abc import Iterator, Mapping
from typing import Any

from server.adapter_files.targets import block_of
from server.db.tables import Base
from server.errors import Detail, MixloomError
from server.resolve import FEED_FORWARD, hidden_size

MAX_DETAILS = 20


def tensor_shapes(adapter: Mapping[str, Any], base: Base) -> dict[str, list[int]]:
    """Name -> shape of every tensor of an adapter with this resolved config."""
    return dict(_tensors(adapter, base))


def _tensors(adapter: Mapping[str, Any], base: Base) -> Iterator[tuple[str, list[int]]]:
    is_mixture, rank = adapter["method"] == "mixlora", adapter["rank"]
    root = "mixlora" if is_mixture else "base_model.model.model"
    for layer in range(base.num_layers):
        for target in adapter["target_modules"]:
            out_width, in_width = base.targets[target]
            place = f"{root}.layers.{layer}.{block_of(target)}.{target}"
            has_experts = is_mixture and target in FEED_FORWARD
            places = [f"{place}.experts.{e}" for e in range(adapter["num_experts"])] if has_experts else [place]
            for each in places:
                yield f"{each}.lora_A.weight", [rank, in_width]
                yield f"{each}.lora_B.weight", [out_width, rank]
                if adapter["dora"]:
                    yield f"{each}.lora_magnitude_vector", [out_width]
        if is_mixture:
            yield f"{root}.layers.{layer}.mlp.moe_gate.weight", [adapter["num_experts"], hidden_size(base)]


def refuse_unfit(found: Mapping[str, list[int]], expected: Mapping[str, list[int]], base: Base) -> None:
    """Raises `adapter_does_not_fit` where names or shapes differ, with the first of them."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    other = [name for name in expected if name in found and found[name] != expected[name]]
    if not missing and not extra and not other:
        return
    counts = [(len(missing), "missing"), (len(extra), "unknown"), (len(other), "of another shape")]
    said = ", ".join(f"{count} {word}" for count, word in counts if count)
    lines = [
        *(f"'{name}' is missing" for name in missing),
        *(f"'{name[:200]}' belongs to no adapter of this config" for name in extra),
        *(f"'{name}' has shape {found[name]}, and needs {expected[name]}" for name in other),
    ]
    raise MixloomError(
        "adapter_does_not_fit",
        f"The tensors do not fit the config on base '{base.name}' ({base.num_layers} layers): {said}. "
        f"{lines[0]}. Take the config that was saved with these weights, on the base that they are for.",
        422,
        "weights",
        [Detail(message=line) for line in lines[:MAX_DETAILS]],
    )
