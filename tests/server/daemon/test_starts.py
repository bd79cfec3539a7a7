"""A job that starts from an adapter: the same bits whatever happens to it, or to the adapter."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine import formats
from server.api.services import Services
from server.db.tables import Run
from tests.server.conftest import Caller
from tests.server.daemon.conftest import MIXTURE, PLAIN, Life, adapters, final_hash, job, submit

METHODS = {"MixDoRA": {**MIXTURE, "dora": True}, "LoRA": PLAIN}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def start(life: Life, alice: Caller, services: Services) -> Callable[[dict[str, Any]], str]:
    """A function that trains an adapter, and gives a checkpoint of it that is not the last."""

    def train(adapter: dict[str, Any]) -> str:
        id_ = submit(alice, adapter, training={"checkpoint_every": 8})
        life.finish()
        return adapters(services, id_)[0].id

    return train


@pytest.mark.parametrize("adapter", METHODS.values(), ids=METHODS)
def test_a_job_ends_with_the_same_bits_after_a_kill_a_pause_and_without_its_source(
    adapter: dict[str, Any],
    start: Callable[[dict[str, Any]], str],
    life: Life,
    new_life: Callable[..., Life],
    alice: Caller,
    bob: Caller,
    services: Services,
) -> None:
    source = start(adapter)
    undisturbed = submit(alice, {}, init_from=source)
    life.finish()
    disturbed, fresh = submit(alice, {}, init_from=source), submit(bob, adapter)
    life.turn(3)
    assert 0 < job(services, disturbed).step < 5, "before its first recovery point"
    alice.delete(f"/adapters/{source}")
    second = new_life(recovery_steps=0)  # the first one is gone as after kill -9
    second.turn_until(lambda: job(services, disturbed).step == 6)
    alice.post(f"/jobs/{disturbed}/pause")
    second.turn_until(lambda: job(services, disturbed).status == "paused")
    alice.post(f"/jobs/{disturbed}/resume")
    second.finish()
    assert final_hash(services, disturbed) == final_hash(services, undisturbed) != final_hash(services, fresh)


def test_a_run_comes_into_memory_with_the_adapters_weights_and_its_card_says_so(
    start: Callable[[dict[str, Any]], str], life: Life, alice: Caller, services: Services
) -> None:
    source = start(PLAIN)
    id_ = submit(alice, {}, steps=1, init_from=source)
    with services.database.read() as session:
        run_id = session.query(Run).filter_by(job_id=id_).one().id
    life.roster.attach(run_id)
    stored = load_file(services.store.path(f"adapters/{source}") / WEIGHTS)
    in_memory = formats.tensors(life.resident(id_).run.adapter)
    assert all(torch.equal(in_memory[name], stored[name]) for name in stored | in_memory)
    life.finish()
    card = (services.store.path(adapters(services, id_)[-1].key) / "README.md").read_text()
    assert job(services, id_).init_from["sha256"] in card
    assert source not in card


def test_a_job_whose_start_is_gone_or_damaged_never_starts_from_other_weights(
    start: Callable[[dict[str, Any]], str], life: Life, alice: Caller, services: Services
) -> None:
    source = start(PLAIN)
    gone, damaged = submit(alice, {}, init_from=source), submit(alice, {}, init_from=source)
    (services.store.path(f"jobs/{gone}") / WEIGHTS).unlink()
    path = services.store.path(f"jobs/{damaged}") / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    life.finish()
    for id_ in (gone, damaged):
        error = job(services, id_).error
        assert (job(services, id_).status, error["code"]) == ("failed", "cannot_start")
        assert str(services.store.root) not in json.dumps(error)
