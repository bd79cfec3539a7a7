"""`auto` becomes what the reference says, and what cannot be is refused by name."""

from typing import Any

import pytest

from server import resolve
from server.api.submission import merged
from server.curriculum import permutation
from server.db.tables import Base
from server.errors import MixloomError
from server.fit import HOLD_OUT_EPOCH, fit_rows, hold_out, num_held_out
from server.job_config import AdapterConfig, JobConfig, TrainingConfig
from server.tokens import TokenRow
from tests.server.conftest import TARGETS


def base(**changes: Any) -> Base:
    values = {"context": 4096, "microbatch_tokens": 4096, "targets": TARGETS, "num_layers": 2}
    return Base(**{**values, **changes})


def training(num_rows: int = 100, valid: int = 10, preset: str | None = None, **config: Any) -> dict[str, Any]:
    return resolve.resolve_training(
        TrainingConfig(**config), base(), preset, num_rows=num_rows, num_validation_rows=valid
    )


def adapter(preset: str | None = None, base_: Base | None = None, **config: Any) -> dict[str, Any]:
    return resolve.resolve_adapter(AdapterConfig(**config), base_ or base(), preset)


def rows(*lengths: int, prompt: int = 1) -> list[TokenRow]:
    return [TokenRow(list(range(n)), [i >= prompt for i in range(n)]) for n in lengths]


def test_defaults_of_an_adapter_are_mixlora_of_rank_16_on_all_seven_projections() -> None:
    assert adapter() == {
        "method": "mixlora",
        "rank": 16,
        "alpha": 32,
        "dropout": 0.05,
        "dora": False,
        "rslora": False,
        "target_modules": list(TARGETS),
        "num_experts": 8,
        "top_k": 2,
        "router_aux_loss_coef": 0.001,
    }


def test_alpha_is_twice_the_rank_unless_given() -> None:
    assert adapter(rank=4)["alpha"] == 8
    assert adapter(rank=4, alpha=5)["alpha"] == 5


def test_lora_has_no_experts() -> None:
    resolved = adapter(method="lora")
    assert (resolved["num_experts"], resolved["top_k"], resolved["router_aux_loss_coef"]) == (None, None, None)


@pytest.mark.parametrize(
    ("config", "code", "param"),
    [
        ({"rank": 33}, "rank_too_large", "adapter.rank"),
        ({"num_experts": 2, "top_k": 3}, "top_k_too_large", "adapter.top_k"),
        ({"target_modules": ["q_proj", "nope"]}, "unknown_target", "adapter.target_modules"),
        ({"target_modules": ["up_proj", "up_proj"]}, "target_twice", "adapter.target_modules"),
        ({"target_modules": ["q_proj"]}, "no_expert_target", "adapter.target_modules"),
        ({"method": "lora", "num_experts": 4}, "field_needs_mixlora", "adapter.num_experts"),
        ({"method": "lora", "top_k": 1}, "field_needs_mixlora", "adapter.top_k"),
        ({"method": "lora", "router_aux_loss_coef": 0.1}, "field_needs_mixlora", "adapter.router_aux_loss_coef"),
    ],
)
def test_what_an_adapter_cannot_be_is_refused(config: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(MixloomError) as caught:
        adapter(**config)
    assert (caught.value.code, caught.value.param, caught.value.status) == (code, param, 422)


def test_an_unknown_target_names_those_that_the_base_has() -> None:
    with pytest.raises(MixloomError, match="q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"):
        adapter(target_modules=["query"])


def test_the_rank_is_bound_by_the_targets_asked_for_alone() -> None:
    assert adapter(rank=64, target_modules=["q_proj", "up_proj"])["rank"] == 64


def test_parameters_are_counted_expert_by_expert() -> None:
    lora = adapter(method="lora", rank=2, target_modules=["q_proj", "up_proj"])
    assert resolve.num_parameters(lora, base()) == 2 * (2 * (64 + 64) + 2 * (96 + 64))
    mixlora = adapter(rank=2, num_experts=3, target_modules=["q_proj", "up_proj"])
    assert resolve.num_parameters(mixlora, base()) == 2 * (2 * (64 + 64) + 3 * 2 * (96 + 64) + 3 * 64)
    magnitudes = resolve.num_parameters({**mixlora, "dora": True}, base()) - resolve.num_parameters(mixlora, base())
    assert magnitudes == 2 * (64 + 3 * 96)


def test_a_single_expert_a_token_comes_with_a_warning() -> None:
    assert "only the auxiliary loss" in resolve.warnings_of(adapter(top_k=1))[0]
    assert resolve.warnings_of(adapter()) == []


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "epochs"),
    [(999, 8, 2), (1000, 16, 2), (400, 8, 2), (200, 8, 4), (100, 8, 8), (20, 8, 10), (3, 3, 10)],
)
def test_batch_and_epochs_follow_from_the_rows(num_rows: int, batch_size: int, epochs: int) -> None:
    resolved = training(num_rows)
    assert (resolved["batch_size"], resolved["epochs"]) == (batch_size, epochs)
    assert resolved["total_steps"] == epochs * -(-num_rows // batch_size)


def test_other_defaults_of_the_training_are_as_designed() -> None:
    resolved = training(400)
    assert resolved["total_steps"] == 100
    assert {name: resolved[name] for name in ("learning_rate", "schedule", "warmup_ratio", "warmup_steps")} == {
        "learning_rate": 2e-4,
        "schedule": "linear",
        "warmup_ratio": 0.03,
        "warmup_steps": 3,
    }
    assert (resolved["weight_decay"], resolved["max_grad_norm"], resolved["seed"]) == (0.0, 1.0, 42)
    assert (resolved["evaluate_every"], resolved["checkpoint_every"], resolved["keep_checkpoints"]) == (50, 50, 3)
    assert (resolved["cutoff_length"], resolved["long_rows"], resolved["supervise"]) == (2048, "refuse", "completion")
    assert (resolved["max_steps"], resolved["microbatch_tokens"]) == (None, 4096)


def test_max_steps_takes_the_place_of_epochs() -> None:
    resolved = training(80, max_steps=7)
    assert (resolved["epochs"], resolved["max_steps"], resolved["total_steps"]) == (None, 7, 7)
    assert resolved["checkpoint_every"] == 7


def test_without_rows_to_evaluate_on_nothing_is_evaluated() -> None:
    assert training(valid=0)["evaluate_every"] is None


@pytest.mark.parametrize(
    ("config", "code", "param"),
    [
        ({"epochs": 2, "max_steps": 3}, "epochs_and_max_steps", "training.max_steps"),
        ({"batch_size": 101}, "batch_too_large", "training.batch_size"),
        ({"cutoff_length": 4097}, "cutoff_too_large", "training.cutoff_length"),
        ({"valid": 0, "evaluate_every": 5}, "no_validation", "training.evaluate_every"),
    ],
)
def test_what_a_training_cannot_be_is_refused(config: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(MixloomError) as caught:
        training(**config)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_a_row_may_be_as_long_as_context_and_microbatch_allow() -> None:
    small = base(context=512, microbatch_tokens=1024)
    assert resolve.cutoff_length(TrainingConfig(), small, None) == 512
    assert resolve.cutoff_length(TrainingConfig(), base(microbatch_tokens=300), None) == 300
    assert resolve.cutoff_length(TrainingConfig(), base(), None) == 2048


def test_the_preset_paper_is_its_table_3() -> None:
    resolved = training(1600, preset="paper")
    assert {name: resolved[name] for name in ("cutoff_length", "learning_rate", "batch_size", "epochs")} == {
        "cutoff_length": 512,
        "learning_rate": 2e-4,
        "batch_size": 16,
        "epochs": 2,
    }
    wide = base(targets={name: [512, 512] for name in TARGETS})
    lora = adapter("paper", wide, method="lora")
    assert (lora["rank"], lora["alpha"], lora["dropout"]) == (80, 160, 0.05)
    mixlora = adapter("paper", wide)
    assert [mixlora[name] for name in ("rank", "alpha", "dropout", "num_experts", "top_k")] == [16, 32, 0.05, 8, 2]
    assert lora["target_modules"] == mixlora["target_modules"] == list(TARGETS)


def test_what_is_given_wins_over_the_preset() -> None:
    assert training(1600, preset="paper", epochs=3)["epochs"] == 3
    assert training(1600, preset="paper", max_steps=3)["epochs"] is None
    assert adapter("paper", rank=4)["alpha"] == 8


@pytest.mark.parametrize(("num_rows", "held_out"), [(99, 0), (100, 10), (150, 15), (3000, 200)])
def test_a_tenth_is_held_out_within_bounds(num_rows: int, held_out: int) -> None:
    assert num_held_out(None, num_rows) == held_out


def test_a_fraction_holds_out_at_least_one_row_and_leaves_one() -> None:
    assert num_held_out(0.01, 10) == 1
    assert num_held_out(0, 10) == 0
    with pytest.raises(MixloomError, match="none can be held out"):
        num_held_out(0.1, 1)


def test_which_rows_are_held_out_depends_on_the_seed_alone() -> None:
    train, valid = hold_out(rows(*range(2, 22)), 5, seed=7)
    chosen = sorted(permutation(7, HOLD_OUT_EPOCH, 20)[:5].tolist())
    assert [len(row.tokens) - 2 for row in valid] == chosen
    assert [len(row.tokens) - 2 for row in train] == [index for index in range(20) if index not in chosen]
    assert hold_out(rows(*range(2, 22)), 5, seed=8)[1] != valid


def test_long_rows_are_refused_with_their_numbers_and_lengths() -> None:
    with pytest.raises(MixloomError) as caught:
        fit_rows(rows(5, 9, 3, 12), cutoff=8, long_rows="refuse", param="dataset")
    assert caught.value.code == "row_too_long"
    assert [(detail.line, detail.message) for detail in caught.value.details] == [
        (2, "row 2 has 9 tokens"),
        (4, "row 4 has 12 tokens"),
    ]


def test_only_the_first_20_long_rows_are_named() -> None:
    with pytest.raises(MixloomError, match="30 of 30 rows") as caught:
        fit_rows(rows(*[9] * 30), cutoff=8, long_rows="refuse", param="dataset")
    assert len(caught.value.details) == 20


def test_skip_leaves_long_rows_out_and_says_how_many() -> None:
    fitted = fit_rows(rows(5, 9, 3), cutoff=8, long_rows="skip", param="dataset")
    assert [len(row.tokens) for row in fitted.rows] == [5, 3]
    assert "1 rows are left out" in fitted.notes[0]


def test_truncate_keeps_the_first_tokens_and_drops_rows_left_with_nothing_to_learn() -> None:
    fitted = fit_rows([*rows(9), *rows(12, prompt=8)], cutoff=8, long_rows="truncate", param="dataset")
    assert [row.tokens for row in fitted.rows] == [list(range(8))]
    assert len(fitted.notes) == 2


@pytest.mark.parametrize("long_rows", ["skip", "truncate"])
def test_a_job_needs_one_row_that_fits(long_rows: Any) -> None:
    with pytest.raises(MixloomError) as caught:
        fit_rows(rows(12, prompt=8), cutoff=8, long_rows=long_rows, param="dataset")
    assert caught.value.code == "no_rows_left"


def test_a_row_with_nothing_to_learn_is_refused() -> None:
    with pytest.raises(MixloomError) as caught:
        fit_rows(rows(5, 1), cutoff=8, long_rows="refuse", param="validation")
    assert (caught.value.code, caught.value.param, caught.value.details[0].line) == (
        "row_without_target",
        "validation",
        2,
    )


@pytest.mark.parametrize(
    ("config", "param"),
    [
        ({"training": {"early_stopping": {"patience": 2}}}, "training.early_stopping"),
    ],
)
def test_what_is_not_there_yet_is_refused_by_name(config: dict[str, Any], param: str) -> None:
    with pytest.raises(MixloomError) as caught:
        resolve.refuse_unsupported(JobConfig(**{"dataset": "ds_1", **config}))
    assert (caught.value.code, caught.value.param) == ("not_supported_yet", param)


def test_a_clone_takes_changes_and_keeps_the_rest() -> None:
    old = {"dataset": "ds_1", "adapter": {"rank": 4}, "training": {"epochs": 2, "seed": 1}, "metadata": {"a": "b"}}
    new = {"adapter": {"alpha": 3}, "training": {"max_steps": 5, "seed": None}, "metadata": {}}
    assert merged(old, new) == {
        "dataset": "ds_1",
        "adapter": {"rank": 4, "alpha": 3},
        "training": {"max_steps": 5, "seed": None},
        "metadata": {},
    }
