"""A job is a client of the engine like any other: the same operations by hand give the same adapter."""

import pytest

from engine.config import AdapterConfig
from engine.engine import Engine
from server.api.services import Services
from server.tokens import TokenRows
from tests.engine.client import train_by_hand
from tests.engine.gangs import fingerprint
from tests.server.conftest import Caller
from tests.server.daemon.conftest import MIXTURE, PLAIN, Life, final_hash, job, submit


@pytest.mark.databases("sqlite")  # the other side has none
@pytest.mark.parametrize("adapter", [MIXTURE, PLAIN], ids=["MixLoRA", "LoRA"])
def test_a_plain_loop_over_the_engine_gives_the_adapter_of_the_job(
    adapter: dict, life: Life, alice: Caller, bob: Caller, services: Services
) -> None:
    """The job trains beside another tenant's, is evaluated and saved on the way; the loop knows only its config."""
    training = {"evaluate_every": 4, "warmup_ratio": 0.2, "weight_decay": 0.01, "schedule": "cosine"}
    id_ = submit(alice, adapter, steps=9, rows=30, batch=7, training=training, validation=0.2)
    submit(bob, MIXTURE)
    life.finish()
    one = job(services, id_)
    data = TokenRows.load(services.store.path(one.tokens_key) / "train.safetensors")
    run = train_by_hand(Engine(life.roster.engine.base), AdapterConfig.from_dict(one.adapter), one.training, data)
    assert fingerprint(run) == final_hash(services, id_)
