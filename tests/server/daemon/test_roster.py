"""Recovery points: written, trusted only when whole, and never of two minds with the database."""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from sqlalchemy import select

from engine.base_model import Fingerprint
from server.api.services import Services
from server.daemon import upkeep
from server.daemon.books import Books
from server.db import runs
from server.db.daemons import Fenced
from server.db.tables import Run, Table
from tests.server.conftest import Caller
from tests.server.daemon.conftest import (
    MIXTURE,
    Life,
    adapters,
    counter,
    events,
    final_hash,
    job,
    points,
    steps,
    submit,
)

NewLife = Callable[..., Life]


def spoil(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_a_job_goes_on_from_its_point_with_the_same_bits_and_every_step_once(
    undisturbed: str, life: Life, new_life: NewLife, alice: Caller, services: Services
) -> None:
    id_ = submit(alice, MIXTURE)
    life.turn_until(lambda: job(services, id_).step == 8)
    second = new_life()  # the first one is gone as after kill -9
    assert job(services, id_).status == "queued"
    assert events(services, id_)[-1] == "interrupted"
    second.turn()
    assert job(services, id_).step == 6
    assert steps(services, id_) == list(range(1, 7))
    second.finish()
    assert final_hash(services, id_) == undisturbed
    assert steps(services, id_) == list(range(1, 13))
    with services.database.read() as session:
        run = session.query(Run).filter_by(job_id=id_).one()
        assert (run.lease_epoch, run.attempts) == (second.books.epoch, 2)
    assert counter(services, alice).counter >= run.cost_charged > 0


def test_lost_steps_are_given_back_to_the_tenant(
    life: Life, new_life: NewLife, alice: Caller, services: Services
) -> None:
    def books() -> tuple[float, int]:
        with services.database.read() as session:
            run = session.query(Run).filter_by(job_id=id_).one()
        return counter(services, alice).counter, run.cost_charged

    id_ = submit(alice, MIXTURE)
    life.turn_until(lambda: job(services, id_).step == 5)
    at_point = books()
    life.turn(3)
    assert books() > at_point
    second = new_life()
    second.roster.attach(points(services, id_)[0].run_id)
    assert books() == at_point


@pytest.mark.parametrize("damage", ["a flipped bit", "a cut file", "a lost file", "a lost folder"])
def test_a_damaged_point_gives_way_to_the_one_before(
    damage: str, undisturbed: str, life: Life, new_life: NewLife, alice: Caller, services: Services
) -> None:
    id_ = submit(alice, MIXTURE)
    life.turn_until(lambda: job(services, id_).step == 11)
    newest, older = points(services, id_)
    assert (newest.step, older.step) == (10, 5)
    state = services.store.path(newest.key) / "state.safetensors"
    if damage == "a flipped bit":
        spoil(state)
    elif damage == "a cut file":
        state.write_bytes(state.read_bytes()[:-100])
    elif damage == "a lost file":
        state.unlink()
    else:
        services.store.delete(newest.key)
    life = new_life()
    life.turn()
    assert job(services, id_).step == 6
    assert "recovery_point_broken" in events(services, id_)
    life.finish()
    assert final_hash(services, id_) == undisturbed
    assert steps(services, id_) == list(range(1, 13))


def test_without_a_whole_point_a_job_fails_and_never_starts_again_from_zero(
    undisturbed: str, life: Life, new_life: NewLife, alice: Caller, bob: Caller, services: Services
) -> None:
    id_, neighbour = submit(alice, MIXTURE), submit(bob, MIXTURE)
    life.turn_until(lambda: job(services, id_).step == 11)
    for point in points(services, id_):
        spoil(services.store.path(point.key) / "run.json")
    new_life().finish()
    assert (job(services, id_).status, job(services, id_).error["code"]) == ("failed", "cannot_start")
    assert "damaged" in job(services, id_).error["message"]
    assert final_hash(services, neighbour) == undisturbed


def test_an_old_life_changes_nothing_any_more(life: Life, alice: Caller, services: Services) -> None:
    def everything() -> list[object]:
        with services.database.engine.connect() as connection:
            return [connection.execute(select(table)).all() for table in Table.metadata.sorted_tables]

    id_ = submit(alice, MIXTURE)
    life.turn_until(lambda: job(services, id_).step == 4)
    resident = life.resident(id_)
    Books.begin(services.database, lease_seconds=60, supervisor="the same")
    before = everything()
    life.writer.put("adapters/late", lambda folder: None, lambda files: None)
    for write in (
        life.loop.turn,
        lambda: life.roster.fail(resident, "diverged", "no"),
        lambda: life.roster.abandon(resident),
        lambda: life.roster.attach(resident.run_id),
        lambda: (life.roster.save(resident), life.writer.wait()),
        lambda: (life.roster.publish_adapter(resident, final=True), life.writer.wait()),
    ):
        with pytest.raises(Fenced):
            write()
    assert everything() == before


def test_what_a_dead_life_had_not_published_is_cleared_away(
    life: Life, new_life: NewLife, alice: Caller, services: Services
) -> None:
    id_ = submit(alice, MIXTURE)
    life.turn_until(lambda: job(services, id_).step == 6)
    orphans = ["adapters/adp_orphan", "recovery/run_gone/1-5", f"recovery/{points(services, id_)[0].run_id}/1-99"]
    for key in [*orphans, "recovery/run_gone/1-10.tmp"]:
        services.store.path(key).mkdir(parents=True)
    new_life()
    assert not any(services.store.path(key).exists() for key in orphans)
    assert not services.store.path("recovery/run_gone").exists()
    assert all(services.store.path(point.key).exists() for point in points(services, id_))


def test_what_a_dead_api_had_not_named_is_cleared_away_an_hour_later(
    life: Life, new_life: NewLife, alice: Caller, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at a start, when nobody knows whether the clock goes right."""
    id_ = submit(alice, MIXTURE)
    named = [f"jobs/{id_}", f"datasets/{job(services, id_).dataset_id}"]
    old = ["jobs/job_gone", "jobs/job_half.tmp", "datasets/ds_gone", "operations/gen_gone", "uploads/adp_gone"]
    new = ["jobs/job_new", "datasets/ds_new.tmp", "uploads/adp_new.tmp"]
    for key in [*old, *new]:
        services.store.path(key).mkdir(parents=True)
    for key in [*old, *named]:
        os.utime(services.store.path(key), (0, 0))
    life = new_life()
    life.loop.upkeep.clear()
    life.writer.wait()
    assert all(services.store.path(key).exists() for key in [*old, *new, *named])
    monkeypatch.setattr(upkeep, "STEADY_SECONDS", 0.0)
    life.loop.upkeep.clear()
    life.writer.wait()
    assert not any(services.store.path(key).exists() for key in old)
    assert all(services.store.path(key).exists() for key in [*new, *named])


@pytest.mark.databases("postgresql")
def test_at_a_start_beside_another_daemon_nothing_is_cleared_away(
    life: Life, new_life: NewLife, services: Services
) -> None:
    keys = ["adapters/adp_new", "recovery/run_new/1-5"]
    for key in keys:
        services.store.path(key).mkdir(parents=True)
        os.utime(services.store.path(key).parent, (0, 0))
        os.utime(services.store.path(key), (0, 0))
    new_life(supervisor="another", name="two")
    assert all(services.store.path(key).exists() for key in keys)


def test_another_machine_goes_on_and_says_that_the_bits_are_not_one_machines(
    life: Life, new_life: NewLife, alice: Caller, bob: Caller, services: Services
) -> None:
    id_, late = submit(alice, MIXTURE), submit(bob, MIXTURE, steps=20)
    life.turn_until(lambda: job(services, id_).step == 8)
    here = asdict(Fingerprint.of(life.roster.engine.base))
    with services.database.write() as session:
        assert [run.fingerprint for run in session.query(Run)] == [here, here]
        session.query(Run).filter_by(job_id=id_).one().fingerprint = {**here, "threads": 16}
    new_life().turn_until(lambda: job(services, id_).step == 10)
    new_life().finish()
    assert events(services, id_).count("not_bit_exact") == 1
    assert [one.exact for one in adapters(services, id_)] == [True, False, False]  # of steps 6, 9, 12
    assert alice.get(f"/jobs/{id_}").json()["exact"] is False
    assert "not_bit_exact" not in events(services, late)
    assert alice.get(f"/adapters/{job(services, id_).adapter_id}").json()["exact"] is False


def test_a_job_that_vanishes_before_it_is_claimed_is_no_error(life: Life, alice: Caller, services: Services) -> None:
    id_ = submit(alice, MIXTURE)
    with services.database.read() as session:
        run_id = session.query(Run).filter_by(job_id=id_).one().id
    alice.post(f"/jobs/{id_}/cancel")
    life.roster.attach(run_id)
    alice.delete(f"/jobs/{id_}")
    life.roster.attach(run_id)
    assert not life.roster.residents
    with services.database.write() as session:
        assert not runs.claim(session, run_id, life.books.epoch, {})
