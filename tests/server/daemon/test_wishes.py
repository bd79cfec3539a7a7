"""What tenants and the operator want, at the wrong moment: while files are written, at the end, twice, taken back."""

import threading
import time

import pytest

from server.api.services import Services
from server.db import drains
from server.db.tables import RecoveryPoint
from server.states import ENDED
from tests.server.conftest import Caller
from tests.server.daemon.conftest import MIXTURE, Gate, Life, adapters, events, final_hash, job, points, steps, submit


def drain(services: Services, **values: object) -> str:
    """The id of a new drain."""
    defaults = {"mode": "quick", "deadline_seconds": None, "reason": "", "daemon": None, "exit_": False}
    with services.database.write() as session:
        return drains.add_drain(session, created_by="admin", **{**defaults, **values}).id  # type: ignore[arg-type]


def undrain(services: Services) -> None:
    with services.database.write() as session:
        drains.end_drains(session)


def is_at_rest(services: Services) -> bool:
    """What `drain --wait` waits for."""
    with services.database.read() as session:
        in_force = drains.open_drain(session)
        assert in_force is not None
        return drains.is_at_rest(session, in_force)


def held_at_its_point(life: Life, gate: Gate, alice: Caller, services: Services) -> str:
    """A job after step 5, whose recovery point waits for the disk."""
    id_ = submit(alice, MIXTURE)
    life.turn_until(lambda: job(services, id_).step == 4)
    gate.close()
    life.loop.turn()
    return id_


def test_pausing_shows_as_a_wish_until_the_point_is_published(
    undisturbed: str, life: Life, gate: Gate, alice: Caller, services: Services
) -> None:
    id_ = held_at_its_point(life, gate, alice, services)
    alice.post(f"/jobs/{id_}/pause")
    for _ in range(3):
        life.loop.turn()
    assert (job(services, id_).status, job(services, id_).requested) == ("running", "pause")
    assert not points(services, id_)
    gate.open()
    life.turn()
    assert (job(services, id_).status, job(services, id_).requested) == ("paused", None)
    assert [point.step for point in points(services, id_)] == [5]
    life.turn(2)
    assert not life.roster.residents
    alice.post(f"/jobs/{id_}/resume")
    life.finish()
    assert final_hash(services, id_) == undisturbed


def test_a_pause_taken_back_in_time_is_none(life: Life, gate: Gate, alice: Caller, services: Services) -> None:
    id_ = submit(alice, MIXTURE)
    life.turn_until(lambda: job(services, id_).step == 4)
    gate.close()
    alice.post(f"/jobs/{id_}/pause")
    life.loop.turn()
    alice.post(f"/jobs/{id_}/resume")
    gate.open()
    life.finish()
    assert job(services, id_).status == "succeeded"
    assert steps(services, id_) == list(range(1, 13))


@pytest.mark.parametrize("deleted", [False, True], ids=["cancelled", "cancelled and deleted"])
def test_a_job_that_ends_while_its_point_is_written_leaves_nothing(
    deleted: bool, life: Life, gate: Gate, alice: Caller, bob: Caller, services: Services
) -> None:
    id_, neighbour = submit(alice, MIXTURE), submit(bob, MIXTURE)
    life.turn_until(lambda: job(services, id_).step == 4)
    gate.close(f"recovery/{life.resident(id_).run_id}/being-written")
    life.loop.turn()
    assert alice.post(f"/jobs/{id_}/cancel").json()["status"] == "cancelled"
    if deleted:
        assert alice.delete(f"/jobs/{id_}").status_code == 200
    life.loop.turn()
    assert [one.job.id for one in life.loop.residents] == [neighbour]
    gate.open()
    life.finish()
    assert job(services, neighbour).status == "succeeded"
    assert not list(services.store.path("recovery").glob("*/*"))
    with services.database.read() as session:
        assert session.query(RecoveryPoint).count() == 0


def test_a_paused_job_that_is_cancelled_leaves_no_points(life: Life, alice: Caller, services: Services) -> None:
    id_ = submit(alice, MIXTURE)
    life.turn_until(lambda: job(services, id_).step == 6)
    alice.post(f"/jobs/{id_}/pause")
    life.turn(2)
    assert points(services, id_)
    alice.post(f"/jobs/{id_}/cancel")
    life.turn(2)
    assert not points(services, id_)
    assert not list(services.store.path("recovery").glob("*/*"))


def test_a_fast_drain_waits_for_the_point_under_way_and_repeats_what_came_after(
    undisturbed: str, life: Life, gate: Gate, alice: Caller, services: Services
) -> None:
    id_ = held_at_its_point(life, gate, alice, services)
    life.loop.turn()
    drain(services, mode="fast")
    threading.Timer(0.3, gate.open).start()
    life.loop.turn()
    assert job(services, id_).status == "queued"
    assert [point.step for point in points(services, id_)] == [5]
    undrain(services)
    life.turn()
    assert steps(services, id_) == list(range(1, 7))
    life.finish()
    assert final_hash(services, id_) == undisturbed
    assert steps(services, id_) == list(range(1, 13))


def test_a_job_paused_while_a_fast_drain_comes_stays_paused_after_it(
    life: Life, alice: Caller, services: Services
) -> None:
    id_ = submit(alice, MIXTURE)
    life.turn_until(lambda: job(services, id_).step == 4)
    alice.post(f"/jobs/{id_}/pause")
    drain(services, mode="fast")
    life.turn()
    assert (job(services, id_).status, job(services, id_).requested) == ("paused", None)


def finish_but_for_the_files(life: Life, gate: Gate, services: Services, job_id: str) -> None:
    """The job's last step is taken, and its adapter waits for the disk."""
    life.turn_until(lambda: job(services, job_id).step == 11)
    gate.close()
    life.loop.turn()
    life.loop.turn()
    assert (job(services, job_id).status, job(services, job_id).step) == ("running", 12)


@pytest.mark.parametrize("deleted", [False, True], ids=["cancelled", "cancelled and deleted"])
def test_a_job_that_is_cancelled_at_its_completion_is_cancelled_and_has_no_last_adapter(
    deleted: bool, life: Life, gate: Gate, alice: Caller, services: Services
) -> None:
    id_ = submit(alice, MIXTURE)
    finish_but_for_the_files(life, gate, services, id_)
    assert alice.post(f"/jobs/{id_}/cancel").json()["status"] == "cancelled"
    if deleted:
        assert alice.delete(f"/jobs/{id_}").status_code == 200
    gate.open()
    life.turn(3)
    assert not life.roster.residents
    named = {one.key for one in adapters(services, id_)}
    assert {f"adapters/{path.name}" for path in services.store.path("adapters").iterdir()} == named
    if not deleted:
        assert (job(services, id_).status, job(services, id_).adapter_id) == ("cancelled", None)
        assert not any(one.final for one in adapters(services, id_))
        assert events(services, id_)[-1] == "cancelled"


def test_a_job_that_is_cancelled_while_a_checkpoint_is_written_has_it(
    life: Life, gate: Gate, alice: Caller, services: Services
) -> None:
    id_ = submit(alice, MIXTURE)
    life.turn_until(lambda: job(services, id_).step == 5)
    gate.close()
    life.loop.turn()
    alice.post(f"/jobs/{id_}/cancel")
    gate.open()
    life.turn(3)
    kept = adapters(services, id_)
    assert [one.step for one in kept] == [3, 6]
    assert {path.name for path in services.store.path("adapters").iterdir()} == {one.id for one in kept}
    assert (job(services, id_).status, job(services, id_).adapter_id) == ("cancelled", None)


def test_a_pause_that_comes_at_the_completion_changes_nothing(
    undisturbed: str, life: Life, gate: Gate, alice: Caller, services: Services
) -> None:
    id_ = submit(alice, MIXTURE)
    finish_but_for_the_files(life, gate, services, id_)
    assert alice.post(f"/jobs/{id_}/pause").json()["requested"] == "pause"
    life.loop.turn()
    gate.open()
    life.turn(2)
    assert final_hash(services, id_) == undisturbed
    assert job(services, id_).requested is None
    assert alice.post(f"/jobs/{id_}/resume").json()["error"]["code"] == "job_ended"


def test_who_finishes_while_a_drain_begins_is_let_finish_and_then_all_rests(
    undisturbed: str, life: Life, gate: Gate, alice: Caller, services: Services
) -> None:
    id_ = submit(alice, MIXTURE)
    finish_but_for_the_files(life, gate, services, id_)
    drain(services)
    life.loop.turn()
    assert not is_at_rest(services)
    gate.open()
    life.turn(3)
    assert is_at_rest(services)
    assert final_hash(services, id_) == undisturbed


def test_an_undrain_that_comes_while_a_run_is_saved_brings_it_back(
    undisturbed: str, life: Life, gate: Gate, alice: Caller, services: Services
) -> None:
    id_ = submit(alice, MIXTURE)
    life.turn_until(lambda: job(services, id_).step == 4)
    gate.close()
    drain(services)
    life.loop.turn()
    undrain(services)
    life.loop.turn()
    gate.open()
    life.finish()
    assert events(services, id_).count("waiting") == 1
    assert final_hash(services, id_) == undisturbed
    assert steps(services, id_) == list(range(1, 13))


@pytest.mark.parametrize("mode", ["quick", "fast"])
def test_a_drain_while_draining_takes_the_place_of_the_first(
    mode: str, undisturbed: str, life: Life, alice: Caller, bob: Caller, services: Services
) -> None:
    id_ = submit(alice, MIXTURE)
    life.turn_until(lambda: job(services, id_).step == 4)
    drain(services, mode="graceful")
    late = submit(bob, MIXTURE)
    life.turn(2)
    assert (job(services, id_).status, job(services, id_).step) == ("running", 6)
    assert not is_at_rest(services)
    second = drain(services, mode=mode)
    life.turn(2)
    assert [job(services, one).status for one in (id_, late)] == ["queued", "queued"]
    assert is_at_rest(services)
    assert life.loop.drain is not None
    assert life.loop.drain.id == second
    undrain(services)
    life.finish()
    assert [final_hash(services, one) for one in (id_, late)] == [undisturbed] * 2


def test_a_graceful_drain_whose_deadline_is_reached_lets_go_at_the_next_step(
    undisturbed: str, life: Life, alice: Caller, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the database's clock: this machine's may be two hours ahead of that of the API that set it."""
    id_ = submit(alice, MIXTURE)
    life.turn_until(lambda: job(services, id_).step == 4)
    drain(services, mode="graceful", deadline_seconds=3600.0)
    with monkeypatch.context() as context:
        context.setattr(time, "time", lambda real=time.time: real() + 7200.0)
        life.turn()
    assert job(services, id_).status == "running"
    drain(services, mode="graceful", deadline_seconds=-1.0)
    life.turn()
    assert job(services, id_).status == "queued"
    assert [point.step for point in points(services, id_)] == [5]
    undrain(services)
    life.finish()
    assert final_hash(services, id_) == undisturbed


def test_who_waits_for_a_drain_waits_until_that_very_drain_has_been_seen(
    life: Life, alice: Caller, services: Services
) -> None:
    id_ = submit(alice, MIXTURE)
    drain(services)
    life.turn()
    assert is_at_rest(services)
    undrain(services)
    drain(services)
    assert not is_at_rest(services), "the daemon may have seen the undrain, and train"
    life.turn()
    assert is_at_rest(services)
    assert job(services, id_).status not in ENDED


def test_a_drain_of_another_daemon_is_none_here(life: Life, alice: Caller, services: Services) -> None:
    id_ = submit(alice, MIXTURE)
    drain(services, daemon="another")
    life.turn(2)
    assert job(services, id_).status == "running"
    drain(services, daemon="one")
    life.turn(2)
    assert job(services, id_).status == "queued"
