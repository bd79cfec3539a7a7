"""Company invariance at the real daemon, for every method: an adapter's hash is that of the job alone.

The passes themselves are tried in `tests/engine/test_invariance.py`, with random gangs and numbers of threads.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engine.base_model import BaseModel
from server.api.services import Services
from tests.server.conftest import Caller
from tests.server.daemon.conftest import MIXTURE, PLAIN, Life, events, final_hash, job, load_frozen, submit

METHODS = {
    "LoRA": {"adapter": PLAIN},
    "rsLoRA": {"adapter": {**PLAIN, "rslora": True, "rank": 3, "alpha": 5}},
    "LoRA+": {"adapter": PLAIN, "training": {"loraplus_ratio": 16}},
    "DoRA": {"adapter": {**PLAIN, "dora": True, "dropout": 0}},
    "MixLoRA": {"adapter": MIXTURE},
    "MixDoRA": {"adapter": {**MIXTURE, "dora": True, "top_k": 3}},
    "MixLoRA MoE": {"adapter": {**MIXTURE, "target_modules": ["gate_proj", "up_proj", "down_proj"], "dropout": 0.3}},
    "attention only": {"adapter": {**PLAIN, "target_modules": ["q_proj", "v_proj"]}},
}
STEPS = 4


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def frozen(folder: Path, request: pytest.FixtureRequest) -> Iterator[BaseModel]:
    """The base of this module's lives, in each type."""
    yield from load_frozen(folder, request.param)


def test_every_method_has_its_bits_in_company_late_paused_evicted_and_on_another_budget(
    new_life: Callable[..., Life], alice: Caller, bob: Caller, services: Services
) -> None:
    life, alone = new_life(), {}
    for name, fields in METHODS.items():
        id_ = submit(alice, steps=STEPS, rows=4, **fields)
        life.finish()
        alone[name] = final_hash(services, id_)
    assert len(set(alone.values())) == len(METHODS)

    life = new_life(token_budget=256, max_resident_runs=4, recovery_steps=0, stay_tokens=1)
    ids = {name: submit(alice, steps=STEPS, rows=4, **fields) for name, fields in [*METHODS.items()][::-1]}
    life.turn_until(lambda: len(life.roster.residents) == 4 and min(map(life.step_of, _resident(life))) >= 1)
    guest = submit(bob, PLAIN, steps=2, rows=4)  # for which one of the others gives up its place
    life.turn_until(lambda: job(services, guest).status == "running")
    (evicted,) = [id_ for id_ in ids.values() if "waiting" in events(services, id_)]
    paused = next(id_ for id_ in _resident(life) if id_ != guest)
    alice.post(f"/jobs/{paused}/pause")
    life.turn_until(lambda: job(services, paused).status == "paused")
    life.turn(2)
    alice.post(f"/jobs/{paused}/resume")
    life.finish()
    assert {name: final_hash(services, id_) for name, id_ in ids.items()} == alone
    assert [events(services, id_).count("running") for id_ in (evicted, paused)] == [2, 2]


def _resident(life: Life) -> list[str]:
    """The ids of jobs in memory."""
    return [resident.job.id for resident in life.loop.residents]
