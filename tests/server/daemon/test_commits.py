"""Each commit on a job's way fails, or goes through and nobody hears of it: the job ends as it would have.

So nothing that belongs together lies in two transactions, and a life that is lost between any two is made up for.
"""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from benchmarks.oracle import Trace, anomalies
from server.api.services import Services
from tests.server.conftest import Caller
from tests.server.daemon.conftest import MIXTURE, Life, OnDisk, submit

NewLife = Callable[..., Life]
TRAINING = {"evaluate_every": 4, "checkpoint_every": 2, "keep_checkpoints": 1}
FEWEST = 15
"""Of commits there are more: a claim and its start, four steps, an evaluation, files and what they replace, the end."""


@contextmanager
def breaking(when: str, after: int, *, in_doubt: bool = False) -> Iterator[list[bool]]:
    """The database breaks off before or after a commit, when so many have gone well; which commits have been struck."""
    been: list[bool] = []

    def strike(_session: Session) -> None:
        been.append(len(been) == after)
        if been[-1]:
            error = sqlite3.OperationalError("disk I/O error")
            raise OperationalError("COMMIT", {}, error, connection_invalidated=in_doubt)

    event.listen(Session, when, strike)
    try:
        yield been
    finally:
        event.remove(Session, when, strike)


@pytest.mark.parametrize("when", ["before_commit", "after_commit"])
def test_a_commit_that_fails_or_is_in_doubt_at_any_place_costs_no_byte(
    when: str, new_life: NewLife, alice: Caller, services: Services
) -> None:
    disk = OnDisk(services.settings.data_dir, services.settings.database_url)

    def begin() -> tuple[Life, str]:
        life = new_life(recovery_steps=1)
        return life, submit(alice, MIXTURE, steps=4, rows=5, batch=1, training=TRAINING, validation=0.2)

    life, id_ = begin()
    life.finish()
    undisturbed = Trace.of(disk, id_)
    for after in count():
        life, id_ = begin()
        with breaking(when, after) as been, suppress(OperationalError):
            life.finish()
        if not any(been):
            break
        life.writer.close()
        new_life(recovery_steps=1).finish()
        assert undisturbed.unlike(Trace.of(disk, id_)) == [], f"commit {after}"
        assert anomalies(disk) == [], f"commit {after}"
    assert after >= FEWEST
