"""Engines over tiny random bases, and over the real SmolLM2: made once, since a base is never written to."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from engine.base_model import BaseModel
from engine.engine import Engine
from tests.models import smollm2_base, tiny_base, tiny_model


@pytest.fixture(scope="session")
def engine() -> Engine:
    return Engine(tiny_base())


@pytest.fixture(scope="session")
def precise_engine() -> Engine:
    """In float64 throughout: transformers' own norms compute in float32, whatever the model's dtype."""
    model = tiny_model(dtype=torch.float64)
    norms = [name for name, module in model.named_modules() if type(module).__name__ == "LlamaRMSNorm"]
    for name in norms:
        theirs = model.get_submodule(name)
        norm = nn.RMSNorm(theirs.weight.shape, eps=theirs.variance_epsilon, dtype=torch.float64)
        norm.load_state_dict(theirs.state_dict())
        model.set_submodule(name, norm)
    return Engine(BaseModel(model, name="tiny", hash_="tiny", microbatch_tokens=128))


@pytest.fixture(scope="session")
def smollm2() -> Engine:
    return Engine(smollm2_base())


THREADS = (1, 2, 3, 5, 16)


@pytest.fixture(params=THREADS, ids=lambda threads: f"{threads} threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many threads for the time of a test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
