"""What the rest relies on, whichever database it is: reads of one moment, writes whole or not at all, and outages."""

import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace

import pytest
from fastapi import FastAPI
from sqlalchemy import Connection, event, select, text
from sqlalchemy.exc import DBAPIError

from server.api.services import Services
from server.db import jobs, runs, session, tenants
from server.db.session import Database, is_outage
from server.db.tables import Base, Job, Tenant
from server.settings import Settings
from tests.postgresql import PostgreSQL
from tests.relay import Relay
from tests.server.conftest import Caller
from tests.server.making import add_adapter, prompt_rows, submit, upload

HELD_SECONDS = 0.3


def names(services: Services) -> set[str]:
    with services.database.read() as reading:
        return set(reading.scalars(select(Tenant.name)))


def test_a_read_sees_one_moment_however_long_it_lasts(services: Services) -> None:
    with services.database.read() as reading:
        assert reading.scalars(select(Tenant.name)).all() == []
        with services.database.write() as writing:
            tenants.add_tenant(writing, "later", 1.0)
        assert reading.scalars(select(Tenant.name)).all() == []
    assert names(services) == {"later"}


def test_the_version_is_another_one_once_anybody_has_written_and_only_then(
    services: Services, settings: Settings
) -> None:
    watching = Database(settings.database)
    versions = [watching.version()]
    names(services)
    assert watching.version() == versions[0]
    for writer in (services.database, watching):
        with writer.write() as writing:
            tenants.add_tenant(writing, f"tenant {len(versions)}", 1.0)
        versions.append(watching.version())
    assert len(set(versions)) == 3
    assert watching.version() == versions[2]
    watching.close()


def test_a_write_that_fails_half_way_leaves_nothing(services: Services) -> None:
    def fail() -> None:
        with services.database.write() as writing:
            tenants.add_tenant(writing, "half", 1.0)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names(services) == set()


@pytest.mark.databases("sqlite")
def test_what_is_committed_is_on_the_disk(services: Services) -> None:
    """So that it is there after the power has failed; a kill would not tell."""
    full = 2
    with services.database.write() as writing:
        assert writing.scalar(text("PRAGMA synchronous")) == full


def test_a_read_writes_nothing(services: Services) -> None:
    with services.database.read() as reading:
        reading.add(Tenant(id="ten_x", name="x", share=1.0, created_at=0.0, deleted_at=None))
    assert names(services) == set()


@pytest.mark.databases("sqlite")
def test_who_reads_lets_another_read_after_it_and_a_write_pass(alice: Caller, services: Services) -> None:
    with ThreadPoolExecutor() as threads:
        with services.database.read():
            asked = threads.submit(alice.get, "/jobs")
            with services.database.write() as writing:
                tenants.add_tenant(writing, "meanwhile", 1.0)
            assert wait([asked], HELD_SECONDS).not_done
        assert asked.result().status_code == 200


@pytest.mark.usefixtures("base")
def test_jobs_that_are_submitted_at_once_have_numbers_of_their_own(alice: Caller, services: Services) -> None:
    first = submit(alice)["id"]
    under_way = threading.Event()

    def add(id_: str) -> int:
        with services.database.write() as writing:
            old = writing.get_one(Job, first)
            copied = {column.name: getattr(old, column.name) for column in Job.__table__.columns}
            jobs.add_job(writing, {**copied, "id": id_}, [])
            under_way.set()
            time.sleep(HELD_SECONDS)  # the other one has begun meanwhile
            return writing.get_one(Job, id_).number

    with ThreadPoolExecutor(2) as pool:
        second = pool.submit(add, "job_second")
        assert under_way.wait(timeout=60)
        third = pool.submit(add, "job_third")
        assert (second.result(), third.result()) == (2, 3)


@pytest.mark.usefixtures("base")
def test_a_job_that_is_being_added_while_its_tenant_is_deleted_is_cancelled_with_it(
    alice: Caller, admin: Caller, services: Services
) -> None:
    first = submit(alice)["id"]
    under_way = threading.Event()

    def add() -> None:
        with services.database.write() as writing:
            tenants.hold_tenant(writing, alice.tenant_id)
            old = writing.get_one(Job, first)
            copied = {column.name: getattr(old, column.name) for column in Job.__table__.columns}
            jobs.add_job(writing, {**copied, "id": "job_second"}, [])
            under_way.set()
            time.sleep(HELD_SECONDS)  # the tenant is being deleted meanwhile

    with ThreadPoolExecutor(1) as pool:
        added = pool.submit(add)
        assert under_way.wait(timeout=60)
        assert admin.delete(f"/admin/tenants/{alice.tenant_id}").status_code == 200
        added.result()
    with services.database.read() as reading:
        assert reading.scalars(select(Job.status)).all() == ["cancelled", "cancelled"]


@pytest.mark.databases("postgresql")
def test_requests_of_a_tenant_hold_up_neither_a_new_share_nor_for_ever_its_deletion(
    alice: Caller, admin: Caller, services: Services
) -> None:
    path = f"/admin/tenants/{alice.tenant_id}"
    with ThreadPoolExecutor(1) as pool:
        with services.database.write() as writing:
            tenants.hold_tenant(writing, alice.tenant_id)
            assert admin.patch(path, json={"share": 2.0}).status_code == 200
            deleted = pool.submit(admin.delete, path)
            while alice.get("/me").status_code == 200:  # so that no more of them come
                assert not deleted.done()
        assert deleted.result().status_code == 200


@pytest.mark.usefixtures("base")
def test_a_job_that_ends_with_an_adapter_while_that_is_deleted_does_not_name_it(
    alice: Caller, services: Services
) -> None:
    job = submit(alice)["id"]
    adapter = add_adapter(services, job, 5)
    under_way = threading.Event()

    def end() -> None:
        with services.database.write() as writing:
            ending = runs.lock_job(writing, job)
            assert ending is not None
            assert runs.adapter_key(writing, adapter) is not None
            under_way.set()
            time.sleep(HELD_SECONDS)  # the adapter is being deleted meanwhile
            ending.status, ending.adapter_id = "failed", adapter

    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(end)
        assert under_way.wait(timeout=60)
        assert alice.delete(f"/adapters/{adapter}").status_code == 200
        ended.result()
    found = alice.get(f"/jobs/{job}").json()
    assert (found["status"], found["adapter_id"]) == ("failed", None)


@pytest.mark.databases("postgresql")
def test_a_writer_that_is_stopped_in_the_middle_holds_nobody_up(
    settings: Settings, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "IDLE_SECONDS", 1)
    stopped = Database(settings.database)
    with services.database.write() as writing:
        tenant = tenants.add_tenant(writing, "alice", 1.0)

    def write_late() -> None:
        with stopped.write() as late:
            late.get_one(Tenant, tenant.id).share = 2.0
            late.flush()
            with services.database.write() as writing:
                writing.get_one(Tenant, tenant.id).share = 3.0

    with pytest.raises(DBAPIError) as caught:
        write_late()
    assert is_outage(caught.value)
    stopped.engine.dispose()
    with services.database.read() as reading:
        assert reading.get_one(Tenant, tenant.id).share == 3.0


@pytest.mark.databases("postgresql")
def test_while_the_database_is_gone_it_is_said_and_after_that_all_is_well(
    admin: Caller, alice: Caller, postgresql: PostgreSQL
) -> None:
    assert alice.get("/jobs").status_code == 200
    postgresql.stop_at_once()
    try:
        gone = alice.get("/jobs")
        assert (gone.status_code, gone.json()["error"]["code"]) == (503, "database_unavailable")
        assert "Retry-After" in gone.headers
        assert admin.get("/readyz").json()["reasons"] == ["The database does not answer: OperationalError."]
    finally:
        postgresql.start()
    assert alice.get("/jobs").status_code == 200


@pytest.mark.databases("postgresql")
def test_who_does_not_hear_of_a_commit_keeps_the_files_that_its_row_may_name(
    alice: Caller, base: Base, services: Services
) -> None:
    def lose_the_next_answer() -> None:
        """The commit of a write happens, and the connection breaks before that is said."""
        lost = []

        def lose(connection: Connection) -> None:
            if lost or connection.get_execution_options().get("postgresql_readonly"):
                return
            lost.append(connection)
            driver = connection.connection.driver_connection
            driver.commit()
            driver.close()

        event.listen(services.database.engine, "commit", lose)

    dataset = upload(alice, prompt_rows(12))
    lose_the_next_answer()
    assert alice.post("/jobs", json={"dataset": dataset}).status_code == 503
    lose_the_next_answer()
    assert alice.post("/datasets", files={"file": ("a.jsonl", '{"text": "a"}')}).status_code == 503
    for noun, count in (("jobs", 1), ("datasets", 2)):
        kept = {f"{noun}/{found['id']}" for found in alice.get(f"/{noun}").json()["data"]}
        assert len(kept) == count
        assert set(services.store.list(noun)) == kept


@pytest.mark.databases("postgresql")
def test_a_statement_that_is_read_by_often_stays_prepared(services: Services) -> None:
    for _ in range(10):
        names(services)
    with services.database.read() as reading:
        prepared = reading.scalars(text("SELECT statement FROM pg_prepared_statements")).all()
    assert any("FROM tenants" in statement for statement in prepared)


@pytest.mark.databases("postgresql")
def test_who_watches_the_version_is_told_of_a_restart_and_watches_on(
    services: Services, settings: Settings, postgresql: PostgreSQL
) -> None:
    watching = Database(settings.database)
    before = watching.version()
    postgresql.stop_at_once()
    postgresql.start()
    with pytest.raises(DBAPIError) as caught:
        watching.version()
    assert is_outage(caught.value)
    with services.database.write() as writing:
        tenants.add_tenant(writing, "later", 1.0)
    assert watching.version() != before
    watching.close()


@pytest.mark.databases("postgresql")
def test_a_database_that_says_nothing_any_more_counts_as_gone(
    services: Services, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "SILENT_SECONDS", 0.5)
    relay = Relay(services.database.url)
    far = Database(settings.model_copy(update={"database_url": relay.url}).database)

    def read() -> None:
        with far.read() as reading:
            reading.scalars(select(Tenant.name)).all()
            relay.swallow()
            reading.scalars(select(Tenant.name)).all()

    with pytest.raises(DBAPIError, match="has said nothing") as caught:
        read()
    assert is_outage(caught.value)
    relay.flow()
    with far.read() as reading:
        assert reading.scalars(select(Tenant.name)).all() == []
    far.engine.dispose()
    relay.end()


def test_who_finds_no_connection_free_is_told_to_try_again(
    app: FastAPI, alice: Caller, services: Services, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "BUSY_SECONDS", 1)
    app.state.services = replace(services, database=Database(settings.database))
    with ExitStack() as taken:
        for _ in range(15):
            taken.enter_context(app.state.services.database.engine.connect())
        refused = alice.get("/jobs")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "database_unavailable")
    assert alice.get("/jobs").status_code == 200
    app.state.services.database.engine.dispose()


@pytest.mark.databases("sqlite")
def test_a_database_that_somebody_locks_for_too_long_is_said_and_after_that_all_is_well(
    admin: Caller, alice: Caller, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "BUSY_SECONDS", 1)
    services.database.close()  # the next connections wait for less
    held = sqlite3.connect(str(services.database.path), isolation_level=None)
    held.execute("BEGIN IMMEDIATE")
    refused = admin.post("/admin/tenants", json={"name": "late"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "database_unavailable")
    assert "Retry-After" in refused.headers
    assert alice.get("/jobs").status_code == 200
    held.close()
    assert admin.post("/admin/tenants", json={"name": "late"}).status_code == 201
