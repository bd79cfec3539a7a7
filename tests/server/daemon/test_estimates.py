"""What the server expects of jobs against what the daemon then does. Time is counted in tokens, one in each unit."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from fastapi import FastAPI

from server.api.services import Services
from server.db.queue import read_outlook
from server.states import ENDED
from tests.server.conftest import Caller, new_tenant
from tests.server.daemon.conftest import PLAIN, Life, jobs, submit
from tests.server.making import prompt_rows, upload

LITTLE = ((3, "normal"), (6, "normal"))
SINGLE = ((12, "normal"), (3, "low"), (6, "high"), (9, "normal"), (3, "normal"))
DOUBLE = ((6, "normal"), (18, "normal"), (3, "high"), (9, "low"), (12, "normal"), (6, "normal"))
"""(steps, priority) of each tenant's jobs. The first has little to do: what it leaves is the others'."""


@pytest.fixture
def carol(app: FastAPI, admin: Caller) -> Iterator[Caller]:
    with new_tenant(app, admin, "carol", share=2.0) as caller:
        yield caller


@pytest.mark.parametrize(("num_places", "tolerance"), [(4, 0.12), (16, 0.06)])
def test_nine_of_ten_finishes_are_as_expected(
    num_places: int,
    tolerance: float,
    new_life: Callable[..., Life],
    alice: Caller,
    bob: Caller,
    carol: Caller,
    services: Services,
) -> None:
    """To a part of the time that all take. The rest, with few places, is of jobs whose tenant gets another's place."""
    life = new_life(max_resident_runs=num_places, stay_tokens=500, recovery_steps=0)
    for caller, sizes in ((alice, LITTLE), (bob, SINGLE), (carol, DOUBLE)):
        dataset = upload(caller, prompt_rows(12))
        for steps, priority in sizes:
            submit(caller, PLAIN, steps=steps, batch=12, dataset=dataset, priority=priority, validation=0)
    life.turn()
    finishes: dict[str, float] = {}
    expected: list[tuple[str, float]] = []
    while len(finishes) < len(found := jobs(services)):
        now = float(sum(job.tokens for job in found))
        with services.database.read() as session:
            outlook = read_outlook(session, found)
        queues = {hash_: replace(queue, tokens_per_second=1.0) for hash_, queue in outlook.queues.items()}
        outlook = replace(outlook, now=now, queues=queues)
        for job in found:
            if job.status in ENDED:
                finishes.setdefault(job.id, now)
                continue
            reason = outlook.reason(job.status, job.base_hash, job.reason)
            finish = outlook.expectation(job.tenant_id, job.id, job.base_hash, reason).finish
            assert finish is not None
            expected.append((job.id, finish))
        life.turn()
    errors = [abs(finish - finishes[id_]) / now for id_, finish in expected]
    assert np.quantile(errors, 0.9) <= tolerance
