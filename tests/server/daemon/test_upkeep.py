"""What is cleared away in time: jobs past theirs, what deleted tenants had, files that no row names."""

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text, update

from server import doctor
from server.api.services import Services
from server.daemon import upkeep
from server.daemon.upkeep import DAY_SECONDS, STEADY_SECONDS
from server.db import operations
from server.db.tables import Adapter, Dataset, Job, Operation, Run, Tenant
from server.orphans import SAFE_SECONDS, orphans
from server.store import LocalStore
from tests.server.conftest import Caller
from tests.server.daemon.conftest import PLAIN, Life, job, jobs, spoil_index, submit

NewLife = Callable[..., Life]


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a life has lasted for an hour."""
    monkeypatch.setattr(upkeep, "STEADY_SECONDS", 0.0)


def end_days_ago(services: Services, job_id: str, days: float) -> None:
    at = time.time() - days * DAY_SECONDS
    with services.database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(created_at=at, finished_at=at))


@pytest.mark.usefixtures("steady")
def test_a_job_past_its_days_goes_with_all_its_files_and_its_data_set_stays(
    new_life: NewLife, alice: Caller, services: Services
) -> None:
    life = new_life(retention_days=30)
    old, young = submit(alice, PLAIN, steps=2), submit(alice, PLAIN, steps=2)
    life.finish()
    end_days_ago(services, old, 30.1)
    end_days_ago(services, young, 29.9)
    waiting = submit(alice, PLAIN, steps=2)
    life.loop.upkeep.clear()
    life.writer.wait()
    assert [one.id for one in jobs(services)] == [young, waiting]
    with services.database.read() as session:
        kept = {one.key for one in session.query(Adapter)}
        assert session.query(Dataset).count() == 3
    assert set(services.store.list("adapters")) == kept
    assert services.store.list("jobs") == sorted(f"jobs/{id_}" for id_ in (young, waiting))


@pytest.mark.usefixtures("steady")
def test_more_than_one_batch_goes_turn_by_turn(
    new_life: NewLife, alice: Caller, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = new_life(retention_days=30)
    old = [submit(alice, PLAIN, steps=1) for _ in range(3)]
    life.finish()
    for id_ in old:
        end_days_ago(services, id_, 31)
    monkeypatch.setattr("server.db.retention.BATCH", 1)
    monkeypatch.setattr(life.loop.upkeep, "_next", 0.0)
    life.turn(3)
    assert jobs(services) == []


@pytest.mark.usefixtures("steady")
@pytest.mark.databases("sqlite")
def test_a_job_that_ended_when_the_clock_stood_before_its_beginning_is_not_old(
    new_life: NewLife, alice: Caller, services: Services
) -> None:
    life = new_life(retention_days=30)
    id_ = submit(alice, PLAIN, steps=1)
    life.finish()
    with services.database.write() as session:
        session.execute(update(Job).values(finished_at=0.0))
    life.loop.upkeep.clear()
    assert [one.id for one in jobs(services)] == [id_]


@pytest.mark.usefixtures("steady")
def test_without_the_setting_nothing_is_ever_too_old(life: Life, alice: Caller, services: Services) -> None:
    id_ = submit(alice, PLAIN, steps=2)
    life.finish()
    end_days_ago(services, id_, 10_000)
    life.loop.upkeep.clear()
    assert [one.id for one in jobs(services)] == [id_]


def test_what_a_deleted_tenant_had_is_erased_and_nobody_elses(
    life: Life, alice: Caller, bob: Caller, admin: Caller, services: Services
) -> None:
    submit(alice, PLAIN, steps=2)
    kept = submit(bob, PLAIN, steps=2)
    life.finish()
    training = submit(alice, PLAIN, steps=20)
    life.turn_until(lambda: bool(life.roster.residents) and life.step_of(training) == 7)
    assert admin.delete(f"/admin/tenants/{alice.tenant_id}").status_code == 200
    life.loop.upkeep.clear()  # even before the daemon has seen it
    life.turn(2)
    assert [one.id for one in jobs(services)] == [kept]
    with services.database.read() as session:
        assert session.query(Run).count() == session.query(Dataset).count() == 1
    for noun in ("jobs", "datasets", "adapters"):
        assert len(services.store.list(noun)) == 1
    assert not list(services.store.path("recovery").glob("*/*"))


def test_a_job_that_a_deleted_tenant_still_has_is_cancelled_and_erased(
    life: Life, alice: Caller, services: Services
) -> None:
    submit(alice, PLAIN)
    life.turn(3)
    assert [one.status for one in jobs(services)] == ["running"]
    with services.database.write() as session:
        session.execute(update(Tenant).values(deleted_at=time.time()))
    life.loop.upkeep.clear()
    life.turn(2)
    assert jobs(services) == []
    assert not life.roster.residents
    assert services.store.list("jobs") == []


def add_operation(services: Services, id_: str, tenant: Caller, deadline: float) -> None:
    key = services.store.put(f"operations/{id_}", lambda folder: None).relative_to(services.store.root)
    asked = {"tenant_id": tenant.tenant_id, "adapter_id": None, "base_hash": "another", "deadline": deadline}
    with services.database.write() as session:
        operations.add_sample(session, id_=id_, key=str(key), **asked)  # type: ignore[arg-type]


@pytest.mark.usefixtures("steady")
def test_what_nobody_read_is_erased_an_hour_after_its_deadline(life: Life, alice: Caller, services: Services) -> None:
    add_operation(services, "old", alice, time.time() - 3700)
    add_operation(services, "recent", alice, time.time() - 3500)
    life.loop.upkeep.clear()
    life.writer.wait()
    assert services.store.list("operations") == ["operations/recent"]
    with services.database.read() as session:
        assert session.query(Operation.id).all() == [("recent",)]


def test_what_a_deleted_tenant_asked_is_erased_and_nobody_elses(
    life: Life, alice: Caller, bob: Caller, admin: Caller, services: Services
) -> None:
    add_operation(services, "gone", alice, time.time() - 1)
    add_operation(services, "waited for", alice, time.time() + 600)
    add_operation(services, "kept", bob, time.time() - 1)
    admin.delete(f"/admin/tenants/{alice.tenant_id}")
    life.loop.upkeep.clear()
    life.writer.wait()
    assert services.store.list("operations") == ["operations/kept", "operations/waited for"]
    with services.database.read() as session:
        assert session.query(Operation.id).order_by(Operation.id).all() == [("kept",), ("waited for",)]


@pytest.mark.databases("sqlite")
def test_a_clock_that_jumps_a_year_ahead_erases_nothing_before_it_has_gone_on_for_an_hour(
    new_life: NewLife, alice: Caller, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, boot, passed, ahead = time.time, upkeep.boot_time, 0.0, 0.0
    monkeypatch.setattr(time, "time", lambda: now() + passed + ahead)
    monkeypatch.setattr(upkeep, "boot_time", lambda: boot() + passed)
    life = new_life(retention_days=30)
    id_ = submit(alice, PLAIN, steps=1)
    life.finish()
    add_operation(services, "unread", alice, time.time())
    new = services.store.path("uploads/adp_new")
    new.mkdir(parents=True)

    def left() -> tuple[int, int, bool]:
        for _ in range(2):  # files without a row wait for jobs past their time
            life.loop.upkeep.clear()
            life.writer.wait()
        return len(jobs(services)), len(services.store.list("operations")), new.exists()

    passed = STEADY_SECONDS
    os.utime(new, (time.time(),) * 2)
    for ahead in (365 * DAY_SECONDS, 0.0):  # noqa: B007
        assert left() == (1, 1, True)
    passed += STEADY_SECONDS
    for ahead in (-365 * DAY_SECONDS, 0.0):  # noqa: B007 (which nobody would see who looks every ten minutes)
        life.turn()
    end_days_ago(services, id_, 31)
    assert left() == (1, 1, True)
    passed += STEADY_SECONDS
    assert left() == (0, 0, False)


@pytest.mark.usefixtures("steady")
def test_a_daemon_that_lives_erases_what_nobody_has_named_for_an_hour(
    life: Life, alice: Caller, services: Services
) -> None:
    id_ = submit(alice, PLAIN)
    life.turn_until(lambda: bool(life.roster.residents) and life.step_of(id_) == 6)
    run = life.resident(id_).run_id
    unnamed = ["adapters/adp_gone", "jobs/job_half.1234.tmp", "uploads/adp_gone", f"recovery/{run}/1-9", "recovery/r"]
    for key in unnamed:
        services.store.path(key).mkdir(parents=True)
    life.loop.upkeep.clear()
    life.writer.wait()
    assert all(services.store.path(key).exists() for key in unnamed), "they may still be named"
    for path in (*services.store.root.rglob("*"),):
        os.utime(path, (time.time() - SAFE_SECONDS - 1,) * 2)
    life.loop.upkeep.clear()
    life.writer.wait()
    assert not any(services.store.path(key).exists() for key in unnamed)
    life.finish()
    assert jobs(services)[0].status == "succeeded"
    left = services.store.path(f"recovery/{run}")
    left.mkdir()  # by who was killed when its points were forgotten, and its folder not yet erased
    os.utime(left, (time.time() - SAFE_SECONDS - 1,) * 2)
    life.loop.upkeep.clear()
    life.writer.wait()
    assert not left.exists()


@pytest.mark.usefixtures("steady")
@pytest.mark.databases("sqlite")
def test_files_whose_row_a_damaged_index_hides_are_not_erased(
    life: Life, new_life: NewLife, alice: Caller, services: Services, caplog: pytest.LogCaptureFixture
) -> None:
    """SQLite reads the ids of all data sets, and finds the job of a run, in an index, and does not notice."""
    one = job(services, submit(alice, PLAIN))
    with services.database.read() as session:
        keys = [f"datasets/{one.dataset_id}", f"recovery/{session.query(Run).one().id}"]
    services.store.path(keys[1]).mkdir(parents=True)
    services.database.close()
    for table in ("datasets", "jobs"):
        spoil_index(services, f"sqlite_autoindex_{table}_1")
    for key in keys:
        os.utime(services.store.path(key), (time.time() - SAFE_SECONDS - 1,) * 2)
    assert sorted(orphans(services.database.read, services.store)) == keys
    life.loop.upkeep.clear()
    life.writer.wait()
    new_life()
    assert services.store.list("datasets") + services.store.list("recovery") == keys
    assert caplog.messages.count("orphans_not_known") == 2


@pytest.mark.usefixtures("steady")
@pytest.mark.databases("postgresql")
def test_no_transaction_is_open_while_a_disk_is_looked_through_that_may_be_slow(
    life: Life, alice: Caller, services: Services, new_life: NewLife, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL ends one that is idle for five seconds."""
    submit(alice, PLAIN)
    life.turn(6)
    idle = text(
        "SELECT count(*) FROM pg_stat_activity WHERE state = 'idle in transaction' AND datname = current_database()"
    )
    seen: list[int] = []

    def looking(name: str) -> Callable[..., Any]:
        looks = getattr(LocalStore, name)

        def look(*arguments: Any) -> Any:
            with services.database.engine.connect() as connection:
                seen.append(connection.scalar(idle))
            return looks(*arguments)

        return look

    services.store.path("adapters/adp_gone").mkdir()
    for name in ("children", "is_older"):
        monkeypatch.setattr(LocalStore, name, looking(name))
    life.loop.upkeep.clear()
    doctor.examine(services.database, services.store)
    new_life()
    assert len(seen) > 20
    assert set(seen) == {0}
