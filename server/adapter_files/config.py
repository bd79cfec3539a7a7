"""`adapter_config.json` in the words of PEFT and of the package `mixlora`.

What changes an adapter's function and is not known here is refused by name, never ignored.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from server import resolve
from server.adapter_files.targets import targets_of
from server.db.tables import Base
from server.errors import MixloomError
from server.job_config import AdapterConfig

NAMES = {
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "dora": "use_dora",
    "rslora": "use_rslora",
    "target_modules": "target_modules",
    "num_experts": "num_experts",
    "top_k": "top_k",
    "router_aux_loss_coef": "router_aux_loss_coef",
}
"""Ours -> the file's."""
METHODS = {"LORA": "lora", "MIXLORA": "mixlora"}
REQUIRED: dict[str, tuple[str, ...]] = {
    "lora": ("rank", "alpha", "target_modules"),
    "mixlora": ("rank", "alpha", "target_modules", "num_experts", "top_k"),
}
ABSENT = {"dropout": 0.0, "dora": False, "rslora": False}
"""What the file means when it does not name a field."""

IGNORED = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("corda_config", "eva_config", "loftq_config", "layers_pattern", "megatron_config", "megatron_core"),
    *("qalora_group_size", "router_init_range", "router_loss", "jitter_noise"),
}
"""Fields that say nothing of what a trained adapter computes, or only together with another that is refused."""
ONLY: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "task_type": (None, "CAUSAL_LM"),
    "routing_strategy": (None, "mixlora"),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}
"""Values that some fields may have. Other initialisations (PiSSA, OLoRA, …) changed the weights of their base."""


def read_config(values: Mapping[str, Any], base: Base) -> dict[str, Any]:
    """The resolved config (as a job's `adapter`) of an adapter that another program may have made.

    Raises `unsupported_adapter_field`, `missing_field`, and what a job's config may be refused for.
    """
    method = METHODS.get(str(values.get("peft_type")))
    if method is None:
        raise _unsupported("peft_type", values.get("peft_type"), f"{' and '.join(METHODS)} are taken")
    known = set(REQUIRED[method]) | ABSENT.keys() | ({"router_aux_loss_coef"} if method == "mixlora" else set())
    _refuse_unknown(values, {NAMES[name] for name in known}, base)
    for name in REQUIRED[method]:
        if values.get(NAMES[name]) is None:
            message = f"'config.{NAMES[name]}': an adapter of type {values['peft_type']} needs it; add it."
            raise MixloomError("missing_field", message, 422, f"config.{NAMES[name]}")
    given = {**ABSENT, **{name: values[NAMES[name]] for name in known if values.get(NAMES[name]) is not None}}
    given["target_modules"] = _targets(given["target_modules"], base)
    try:
        config = AdapterConfig.model_validate({"method": method, **given})
    except ValidationError as error:
        problem = error.errors()[0]
        param = f"config.{NAMES[str(problem['loc'][0])]}"
        raise MixloomError("invalid_adapter_config", f"'{param}': {problem['msg']}.", 422, param) from None
    try:
        return resolve.resolve_adapter(config, base, None)
    except MixloomError as error:
        ours = str(error.param)
        param = f"config.{NAMES[ours.removeprefix('adapter.')]}"
        raise replace(error, param=param, message=error.message.replace(ours, param)) from None


def _refuse_unknown(values: Mapping[str, Any], read: set[str], base: Base) -> None:
    for name, value in values.items():
        if name in read or name in IGNORED:
            continue
        if name in ONLY:
            if value not in ONLY[name]:
                taken = ", ".join(str(one) for one in ONLY[name] if one is not None)
                raise _unsupported(name, value, f"it may be {taken}")
        elif name == "act_fn" and base.activation is not None:
            if value not in (None, base.activation):
                raise _unsupported(name, value, f"the base's activation is {base.activation}")
        elif value:  # off is null, false, 0 or empty
            raise _unsupported(name, value, "it must be off (null, false or empty)")


def _targets(asked: Any, base: Base) -> Any:
    if asked == "all-linear":
        return list(base.targets)
    if isinstance(asked, str):
        raise _unsupported("target_modules", asked, "a regular expression is not read; list the modules")
    if not isinstance(asked, list) or not all(isinstance(name, str) for name in asked):
        return asked  # which no config may be
    try:
        return targets_of(asked, base)
    except ValueError as error:
        raise _unsupported("target_modules", asked, str(error)) from None


def _unsupported(name: str, value: Any, rule: str) -> MixloomError:
    shown = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:80]}…"
    return MixloomError(
        "unsupported_adapter_field",
        f"'config.{name}' is {shown}: {rule}. What this field does cannot be kept here; take an adapter without it.",
        422,
        f"config.{name}",
    )


def disk_config(adapter: Mapping[str, Any], base: Base) -> dict[str, Any]:
    """The contents of `adapter_config.json` for a resolved config: what the engine writes for the same adapter."""
    values = {
        "base_model_name_or_path": base.name,
        "bias": "none",
        "peft_type": next(type_ for type_, method in METHODS.items() if method == adapter["method"]),
        "task_type": "CAUSAL_LM",
        **{NAMES[name]: adapter[name] for name in (*REQUIRED["lora"], *ABSENT)},
    }
    if adapter["method"] == "mixlora":
        values |= {NAMES[name]: adapter[name] for name in resolve.MIXLORA_ONLY}
        values |= {"act_fn": base.activation, "routing_strategy": "mixlora"}
    return values
