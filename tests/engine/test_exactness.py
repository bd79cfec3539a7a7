"""What the base promises is tried on this machine, and a promise that is not kept is not made."""

import itertools
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN

from engine import exactness
from engine.base_model import BaseModel
from engine.engine import Engine
from tests.engine.gangs import random_job, train, train_alone
from tests.engine.loads import lora
from tests.models import VOCABULARY, tiny_base


def base_of_width(width: int) -> BaseModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=64,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
    )
    return BaseModel(AutoModelForCausalLM.from_config(config), name="odd", hash_="odd")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "gemma"])
def test_the_facts_hold_here_for_even_widths(model_type: str, dtype: torch.dtype) -> None:
    assert exactness.failing_facts(tiny_base(model_type, dtype)) == []


def test_the_activation_that_is_tried_is_the_bases_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()
    monkeypatch.setitem(ACT2FN, "gelu_pytorch_tanh", lambda: lambda y_nO: y_nO + next(calls))
    assert exactness.failing_facts(tiny_base("gemma")) == ["segments anywhere in a pack"]
    assert exactness.failing_facts(tiny_base("llama")) == []


@pytest.mark.parametrize("width", [101, 128, 1013])
def test_a_base_that_is_promised_to_be_exact_is(width: int) -> None:
    """At odd widths a segment's rows begin at any address, and some machines' matmuls notice."""
    base = base_of_width(width)
    config = replace(lora(), dropout=0.0)
    jobs = [random_job(config, seed, [[[9, 4], [6]], [[7], [12]]], VOCABULARY) for seed in range(2)]
    together = train(Engine(base), jobs, [[0, 1]] * 4)
    if together != [train_alone(Engine(base), job) for job in jobs]:
        assert exactness.failing_facts(base)


def test_a_fact_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(exactness.FACTS, "rows of frozen matmuls", lambda *_: False)
    assert exactness.failing_facts(tiny_base()) == ["rows of frozen matmuls"]
