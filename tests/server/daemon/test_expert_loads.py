"""Loads of experts at the real daemon: kept with their steps, and gone with them."""

from collections.abc import Callable

from server.api.services import Services
from server.db.tables import ExpertLoads
from tests.server.conftest import Caller
from tests.server.daemon.conftest import MIXTURE, Life, job, submit

NewLife = Callable[..., Life]


def loads(services: Services, job_id: str) -> dict[int, list[list[int]]]:
    """Those of the experts that are kept of a job, by step."""
    with services.database.read() as session:
        rows = session.query(ExpertLoads).filter_by(job_id=job_id).order_by(ExpertLoads.step)
        return {row.step: row.loads for row in rows}


def test_loads_above_a_point_are_recorded_anew_and_go_with_their_job(
    new_life: NewLife, alice: Caller, services: Services
) -> None:
    life = new_life(recovery_steps=8)
    id_ = submit(alice, MIXTURE, steps=20)
    life.turn_until(lambda: job(services, id_).step == 11)
    before = loads(services, id_)
    assert list(before) == [10]
    second = new_life()
    second.turn()
    assert (job(services, id_).step, loads(services, id_)) == (9, {})
    second.finish()
    after = loads(services, id_)
    assert (list(after), after[10]) == ([10, 20], before[10])
    alice.delete(f"/jobs/{id_}")
    assert loads(services, id_) == {}
