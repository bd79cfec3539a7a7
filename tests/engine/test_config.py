"""What an adapter may be, and whether it fits a base: each refusal says the rule and the value."""

import pytest

from engine.config import AdapterConfig
from engine.engine import Engine
from engine.errors import EngineError
from tests.engine.loads import lora, mixlora


@pytest.mark.parametrize(
    ("make", "changes", "sentence"),
    [
        (lora, {"rank": 0}, "rank must be 1 or more, got 0"),
        (lora, {"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        (lora, {"dropout": -0.1}, "dropout must be at least 0 and below 1, got -0.1"),
        (lora, {"target_modules": ()}, "target_modules must name at least one module"),
        (mixlora, {"top_k": 5}, "1 <= top_k <= num_experts must hold, got 5 and 4"),
        (mixlora, {"top_k": 0}, "1 <= top_k <= num_experts must hold, got 0 and 4"),
        (mixlora, {"num_experts": None}, "1 <= top_k <= num_experts must hold, got 2 and None"),
        (mixlora, {"router_aux_loss_coef": None}, "mixlora needs a router_aux_loss_coef"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(make, changes: dict, sentence: str) -> None:
    with pytest.raises(EngineError, match=sentence):
        make(**changes)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            lora(target_modules=("q_proj", "w1")),
            "target module 'w1' matches nothing; this base has q_proj, .*down_proj",
        ),
        (lora(17), "rank 17 is above 16, the width of 'k_proj'"),
        (
            mixlora(target_modules=("q_proj",)),
            "mixlora needs a feed-forward target: one of gate_proj, up_proj, down_proj",
        ),
    ],
    ids=["no such module", "rank above a width", "nothing to route"],
)
def test_an_adapter_that_does_not_fit_the_base_is_refused(engine: Engine, config: AdapterConfig, sentence: str) -> None:
    with pytest.raises(EngineError, match=sentence):
        engine.create_run(config, seed=0)


def test_an_unknown_key_is_refused_by_its_name() -> None:
    with pytest.raises(TypeError, match="lora_alpha"):
        AdapterConfig.from_dict(lora().as_dict() | {"lora_alpha": 8})


@pytest.mark.parametrize("config", [lora(8, rslora=True), mixlora(2, 3, 1)], ids=["LoRA", "MixLoRA"])
def test_a_config_comes_back_from_its_dict(config: AdapterConfig) -> None:
    assert AdapterConfig.from_dict(config.as_dict()) == config


def test_the_scaling_is_alpha_over_rank_or_over_its_root() -> None:
    assert lora(16, alpha=8).scaling == 0.5
    assert lora(16, alpha=8, rslora=True).scaling == 2
