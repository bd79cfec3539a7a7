"""A job's config made concrete: `auto` becomes a value, and what cannot be is refused by name.

Pure functions of the config, the base and the rows' lengths. Knows no SQL and no HTTP.
"""

import math
from typing import Any

from server.curriculum import steps_per_epoch
from server.db.tables import Base
from server.errors import MixloomError, not_supported_yet
from server.fit import LongRows
from server.job_config import AdapterConfig, JobConfig, TrainingConfig
from server.render import Supervise

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
PRIORITIES = {"low": 1, "normal": 4, "high": 16}
MIXLORA_ONLY = ("num_experts", "top_k", "router_aux_loss_coef")
SET_BY_START = ("method", "rank", "alpha", "dora", "rslora", "num_experts", "top_k", "target_modules")
"""What a job has in common with the adapter that it starts from: the weights mean nothing without it."""

ADAPTER_DEFAULTS: dict[str, Any] = {"dora": False, "rslora": False, "rank": 16, "dropout": 0.05}
MIXLORA_DEFAULTS: dict[str, Any] = {"num_experts": 8, "top_k": 2, "router_aux_loss_coef": 0.001}
TRAINING_DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-4,
    "loraplus_ratio": 1.0,
    "schedule": "linear",
    "warmup_ratio": 0.03,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "cutoff_length": 2048,
    "keep_checkpoints": 3,
}
PAPER_ADAPTER: dict[str, dict[str, Any]] = {
    "mixlora": {"rank": 16, "dropout": 0.05, "num_experts": 8, "top_k": 2},
    "lora": {"rank": 80, "dropout": 0.05},
}
PAPER_TRAINING: dict[str, Any] = {"cutoff_length": 512, "learning_rate": 2e-4, "batch_size": 16, "epochs": 2}
"""Table 3; its alpha is 2 * rank, as is our default. Its 8 accumulation steps cut a batch of 16 into passes of
2 rows: a step has 16 all the same."""

DEFAULT_SEED = 42
WANTED_STEPS = 100
FEWEST_EPOCHS, MOST_EPOCHS = 2, 10
LARGE_DATASET_ROWS = 1000
BYTES_PER_PARAMETER = 4
TRAINING_BYTES_PER_PARAMETER = 16  # weight, gradient and two moments, float32 each


def refuse_unsupported(config: JobConfig) -> None:
    """Raises `not_supported_yet` for the first field whose feature this version does not have."""
    asked = {
        "training.early_stopping": config.training.early_stopping is not None,
    }
    for param, is_asked in asked.items():
        if is_asked:
            raise not_supported_yet(param)


def longest_row(base: Base) -> int:
    """Most tokens that a row of a new job may have."""
    return min(base.context, base.microbatch_tokens)


def resolve_adapter(
    config: AdapterConfig, base: Base, preset: str | None, start: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The adapter's config with every value concrete, checked against the base.

    `start` is the resolved config of the adapter that the job starts from.
    """
    if start is not None:
        config = _like(config, start)
    method = config.method or "mixlora"
    paper = PAPER_ADAPTER[method] if preset == "paper" else {}
    defaults = {**ADAPTER_DEFAULTS, **(MIXLORA_DEFAULTS if method == "mixlora" else {}), **paper}
    given = config.model_dump(exclude_none=True, exclude={"method"})
    if method == "lora" and (odd := [name for name in MIXLORA_ONLY if name in given]):
        raise _refused(odd[0], "field_needs_mixlora", "it belongs to method 'mixlora', and the method is 'lora'")
    values = {**defaults, **given}
    targets = _targets(config.target_modules, method, base)
    smallest = min(min(base.targets[target]) for target in targets)
    if values["rank"] > smallest:
        raise _refused("rank", "rank_too_large", f"it is {values['rank']}; the narrowest target allows {smallest}")
    if method == "mixlora" and values["top_k"] > values["num_experts"]:
        said = f"it is {values['top_k']}, more than num_experts, which is {values['num_experts']}"
        raise _refused("top_k", "top_k_too_large", said)
    return {
        "method": method,
        "rank": values["rank"],
        "alpha": values.get("alpha", 2 * values["rank"]),
        "dropout": values["dropout"],
        "dora": values["dora"],
        "rslora": values["rslora"],
        "target_modules": targets,
        **{name: values.get(name) for name in MIXLORA_ONLY},
    }


def _like(config: AdapterConfig, start: dict[str, Any]) -> AdapterConfig:
    """The values of `start` where none are given. Raises `init_from_mismatch`."""
    given = config.model_dump(exclude_none=True)
    has = {name: value for name, value in start.items() if value is not None}
    for name in SET_BY_START:
        if name not in given or name not in has:
            continue
        is_same = set(given[name]) == set(has[name]) if name == "target_modules" else given[name] == has[name]
        if not is_same:
            said = f"it is {_shown(given[name])}, and the adapter in 'init_from' has {_shown(has[name])}; leave it out"
            raise _refused(name, "init_from_mismatch", said)
    return AdapterConfig(**{**has, **given, "target_modules": has["target_modules"]})


def _shown(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value).lower()


def _targets(asked: list[str] | None, method: str, base: Base) -> list[str]:
    seven = [target for target in (*ATTENTION, *FEED_FORWARD) if target in base.targets]
    targets = seven if asked is None else asked
    for target in targets:
        if target not in base.targets:
            has = ", ".join(base.targets)
            raise _refused("target_modules", "unknown_target", f"'{target}' is no module of the base, which has {has}")
        if targets.count(target) > 1:
            raise _refused("target_modules", "target_twice", f"'{target}' is there twice")
    if method == "mixlora" and not set(targets) & set(FEED_FORWARD):
        said = f"mixlora has its experts in {', '.join(FEED_FORWARD)}: name one of them, or use method 'lora'"
        raise _refused("target_modules", "no_expert_target", said)
    return targets


def cutoff_length(config: TrainingConfig, base: Base, preset: str | None) -> int:
    """Tokens that a row may have. Raises `cutoff_too_large`."""
    most = longest_row(base)
    if config.cutoff_length is None:
        return min(most, _training_defaults(preset)["cutoff_length"])
    if config.cutoff_length > most:
        said = f"it is {config.cutoff_length}; a row may have up to {most} tokens here"
        raise _refused("cutoff_length", "cutoff_too_large", said, "training")
    return config.cutoff_length


def seed_of(config: TrainingConfig) -> int:
    """The job's seed."""
    return DEFAULT_SEED if config.seed is None else config.seed


def supervise_of(config: TrainingConfig) -> Supervise:
    """Which tokens the job learns."""
    return config.supervise or "completion"


def long_rows_of(config: TrainingConfig) -> LongRows:
    """What the job does with rows over its cutoff."""
    return config.long_rows or "refuse"


def resolve_training(
    config: TrainingConfig, base: Base, preset: str | None, *, num_rows: int, num_validation_rows: int
) -> dict[str, Any]:
    """The training config with every value concrete. `num_rows` are those to train on."""
    if config.epochs is not None and config.max_steps is not None:
        raise _refused("max_steps", "epochs_and_max_steps", "give it or 'epochs', not both", "training")
    if config.batch_size is not None and config.batch_size > num_rows:
        said = f"it is {config.batch_size}, more than the {num_rows} rows to train on"
        raise _refused("batch_size", "batch_too_large", said, "training")
    if config.evaluate_every is not None and not num_validation_rows:
        said = "there are no rows to evaluate on; set 'validation'"
        raise _refused("evaluate_every", "no_validation", said, "training")
    values = {**_training_defaults(preset), **config.model_dump(exclude_none=True)}
    auto_batch = 8 if num_rows < LARGE_DATASET_ROWS else 16
    batch_size = min(values.get("batch_size", auto_batch), num_rows)
    epoch_steps = steps_per_epoch(num_rows, batch_size)
    epochs = values.get("epochs") or _auto_epochs(epoch_steps)
    total_steps = config.max_steps or epochs * epoch_steps
    every_epoch = min(epoch_steps, total_steps)
    return {
        "epochs": None if config.max_steps else epochs,
        "max_steps": config.max_steps,
        "batch_size": batch_size,
        "learning_rate": values["learning_rate"],
        "loraplus_ratio": values["loraplus_ratio"],
        "schedule": values["schedule"],
        "warmup_steps": math.ceil(values["warmup_ratio"] * total_steps),
        "warmup_ratio": values["warmup_ratio"],
        "weight_decay": values["weight_decay"],
        "max_grad_norm": values["max_grad_norm"],
        "cutoff_length": cutoff_length(config, base, preset),
        "microbatch_tokens": base.microbatch_tokens,
        "long_rows": long_rows_of(config),
        "supervise": supervise_of(config),
        "seed": seed_of(config),
        "evaluate_every": values.get("evaluate_every", every_epoch) if num_validation_rows else None,
        "checkpoint_every": values.get("checkpoint_every", every_epoch),
        "keep_checkpoints": values["keep_checkpoints"],
        "total_steps": total_steps,
    }


def _training_defaults(preset: str | None) -> dict[str, Any]:
    return {**TRAINING_DEFAULTS, **(PAPER_TRAINING if preset == "paper" else {})}


def _auto_epochs(epoch_steps: int) -> int:
    return min(MOST_EPOCHS, max(FEWEST_EPOCHS, math.ceil(WANTED_STEPS / epoch_steps)))


def num_parameters(adapter: dict[str, Any], base: Base) -> int:
    """Trained parameters of a resolved adapter."""
    experts = adapter["num_experts"] or 1
    in_experts = FEED_FORWARD if adapter["method"] == "mixlora" else ()
    per_layer = 0
    for target in adapter["target_modules"]:
        out_width, in_width = base.targets[target]
        magnitudes = out_width if adapter["dora"] else 0
        pairs = experts if target in in_experts else 1
        per_layer += pairs * (adapter["rank"] * (out_width + in_width) + magnitudes)
    if adapter["method"] == "mixlora":
        per_layer += experts * hidden_size(base)
    return base.num_layers * per_layer


def hidden_size(base: Base) -> int:
    """Width of what a router reads."""
    return next(base.targets[name][1] for name in ("gate_proj", "up_proj", "q_proj") if name in base.targets)


def warnings_of(adapter: dict[str, Any]) -> list[str]:
    """What a tenant should know about a config that is allowed all the same."""
    if adapter["method"] == "mixlora" and adapter["top_k"] == 1:
        return ["top_k is 1: the one expert's weight is always 1, so only the auxiliary loss trains the router."]
    return []


def _refused(name: str, code: str, said: str, part: str = "adapter") -> MixloomError:
    param = f"{part}.{name}"
    return MixloomError(code, f"'{param}': {said}.", 422, param)
