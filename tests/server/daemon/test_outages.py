"""A database that is away, silent, locked, full, or of another time than before: jobs lose time, and no byte."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Pool, event, make_url, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnectionFree

from benchmarks.oracle import Trace
from engine.base_model import BaseModel
from engine.engine import Engine
from server.api.services import Services
from server.daemon import upkeep
from server.daemon.books import Books
from server.daemon.main import Daemon, Served
from server.daemon.publish import base_row, read_tokenizer
from server.daemon.room import Room
from server.daemon.upkeep import STEADY_SECONDS
from server.db import daemons, session
from server.db import tables as t
from server.db.migrate import refuse_newer, upgrade
from server.db.session import Database
from server.errors import MixloomError
from server.faults import Fault, arm
from server.settings import Settings
from server.states import ENDED
from server.store import manifest
from tests import postgresql as package
from tests.postgresql import PostgreSQL
from tests.relay import Relay
from tests.server.conftest import Caller
from tests.server.daemon.conftest import (
    MIXTURE,
    PLAIN,
    Life,
    OnDisk,
    counter,
    final_hash,
    job,
    memory_of,
    points,
    steps,
    submit,
)
from tests.server.daemon.test_wishes import drain, undrain
from tests.server.making import prompt_rows, upload

STEPS = 40
WAIT_SECONDS = 120.0
WITHOUT_END = 2**30
LOCK = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def daemon(frozen: BaseModel, folder: Path, services: Services) -> Iterator[Callable[..., Daemon]]:
    """A whole daemon in this process, with its base already in memory."""
    made: list[Daemon] = []
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def make(**changes: Any) -> Daemon:
        settings = Settings(**{**services.settings.model_dump(), "recovery_steps": 3, **changes})
        one = Daemon(settings, Database(settings.database), None)
        tokenizer = read_tokenizer(frozen, folder, settings)
        row = base_row(frozen, source=folder, tokenizer=tokenizer, probed={}, memory=memory_of(frozen))
        one.served = Served(Engine(frozen), row, tokenizer, Room(row, 2**40), 64, 0.0)
        made.append(one)
        return one

    yield make
    for one in made:
        one.database.engine.dispose()
    signal.signal(signal.SIGTERM, before[0])
    signal.signal(signal.SIGINT, before[1])


Check = Callable[..., None]


@pytest.fixture(scope="module")
def kept() -> list[Trace]:
    return []


@pytest.fixture
def check(kept: list[Trace], life: Life, alice: Caller, services: Services, armed: Path) -> Check:
    """Lets a daemon train a job, and something happen meanwhile: it ends as one that nothing has happened to."""
    disk = OnDisk(services.settings.data_dir, services.settings.database_url)
    if not kept:  # once a module: on either kind of database the same
        lonely = submit(alice, MIXTURE, steps=STEPS)
        life.finish()
        kept.append(Trace.of(disk, lonely))
    life.books.end()

    def metered() -> int:
        return counter(services, alice).trained_tokens

    def disturbed(daemon: Daemon, disturb: Callable[[], None], *, at_step: int = 4) -> None:
        before, id_ = metered(), submit(alice, MIXTURE, steps=STEPS)

        def others() -> None:
            try:
                wait_until(lambda: job(services, id_).step >= at_step)
                arm(armed, Fault(point="pass.begin", kind="delay", times=STEPS, seconds=0.5))  # it is not to end yet
                disturb()
                arm(armed)
                wait_until(lambda: job(services, id_).status in ENDED)
            finally:
                daemon.stopping.set()

        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(others)
            assert daemon.run() == 0
            done.result()
        assert kept[0].unlike(Trace.of(disk, id_)) == []
        assert final_hash(services, id_) == kept[0].adapters[-1]["sha256"]
        assert steps(services, id_) == list(range(1, STEPS + 1))
        assert metered() - before == job(services, id_).tokens

    return disturbed


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end:
        with suppress(DBAPIError):  # the database may be gone
            if condition():
                return
        time.sleep(0.02)
    raise AssertionError(f"not within {WAIT_SECONDS} seconds")


@pytest.mark.databases("postgresql")
def test_a_database_that_is_gone_for_a_while_costs_time_and_no_byte(
    check: Check, daemon: Callable[..., Daemon], postgresql: PostgreSQL, caplog: pytest.LogCaptureFixture
) -> None:
    def restart() -> None:
        postgresql.stop_at_once()
        wait_until(lambda: "life_lost" in caplog.messages)
        postgresql.start()

    check(daemon(), restart)


@dataclass(frozen=True)
class Pair:
    """A server, and another that repeats what it does and may take its place."""

    primary: PostgreSQL
    standby: PostgreSQL
    database: str

    @property
    def url(self) -> str:
        """Of the database in that server of the two that takes writes."""
        hosts = f"{self.primary.host},{self.standby.host}"
        return f"postgresql://postgres@/{self.database}?host={hosts}&target_session_attrs=read-write"

    def follows(self, how: str) -> bool:
        """Whether the standby is "sync" or "async"."""
        return self.primary.execute("SELECT sync_state FROM pg_stat_replication") == [how]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """With the tables in a database, and an asynchronous standby."""
    if package.MISSING:
        pytest.skip(package.MISSING)
    primary = PostgreSQL()
    url = primary.new_database()
    upgrade(Settings(data_dir=tmp_path / "upgrade", database_url=url))
    standby = PostgreSQL(standby_of=primary)
    yield Pair(primary, standby, str(make_url(url).database))
    standby.end()
    primary.end()


@pytest.mark.databases("failover")
def test_a_synchronous_standby_that_takes_over_costs_time_and_no_byte(
    check: Check, daemon: Callable[..., Daemon], pair: Pair, alice: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    pair.primary.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
    pair.primary.execute("SELECT pg_reload_conf()")
    wait_until(lambda: pair.follows("sync"))

    def fail_over() -> None:
        accepted = upload(alice, prompt_rows(3))
        pair.primary.stop_at_once()
        assert alice.get("/jobs").status_code == 503
        wait_until(lambda: "life_lost" in caplog.messages)
        pair.standby.promote()
        assert alice.get(f"/datasets/{accepted}").status_code == 200, "what was answered 201 is there"

    check(daemon(), fail_over)


@pytest.mark.databases("failover")
def test_what_a_standby_that_lags_behind_does_not_have_is_trained_again(
    check: Check, daemon: Callable[..., Daemon], pair: Pair, services: Services
) -> None:
    """Steps, and maybe the second of the job's two recovery points; the first one is in both."""

    def step() -> int:
        """Of the newest job."""
        with services.database.read() as reading:
            return reading.scalars(select(t.Job.step).order_by(t.Job.number.desc())).first() or 0

    def step_there() -> int:
        return int(pair.standby.execute("SELECT step FROM jobs ORDER BY number DESC", pair.database)[0])

    def fail_over() -> None:
        wait_until(lambda: step() > 15)
        wait_until(lambda: step_there() > 15)
        pair.standby.execute("ALTER SYSTEM SET primary_conninfo = ''")
        pair.standby.execute("SELECT pg_reload_conf()")
        wait_until(lambda: not pair.follows("async"))
        there = step_there()
        wait_until(lambda: step() > there)
        pair.primary.stop_at_once()
        pair.standby.promote()

    check(daemon(recovery_steps=15), fail_over)


@pytest.mark.databases("sqlite")
def test_a_database_that_somebody_locks_for_too_long_costs_time_and_no_byte(
    check: Check,
    daemon: Callable[..., Daemon],
    services: Services,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(session, "BUSY_SECONDS", 1)

    def lock() -> None:
        subprocess.run([sys.executable, "-c", LOCK, str(services.database.path), "3"], check=True)

    check(daemon(), lock)
    assert "life_lost" in caplog.messages


def test_a_pool_that_has_no_connection_free_costs_time_and_no_byte(
    check: Check, daemon: Callable[..., Daemon], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(session, "BUSY_SECONDS", 1)
    one = daemon()

    def take_all() -> None:
        with ExitStack() as held:
            with suppress(NoConnectionFree):
                while True:
                    held.enter_context(one.database.engine.connect())
            wait_until(lambda: "life_lost" in caplog.messages)

    check(one, take_all)
    (reason, *_) = (record.fields["reason"] for record in caplog.records if record.message == "life_lost")
    assert "QueuePool limit" in reason


@pytest.mark.databases("sqlite")
def test_a_tokenizer_that_goes_before_the_first_adapter_of_a_life_is_written_anew(
    check: Check, daemon: Callable[..., Daemon], services: Services, caplog: pytest.LogCaptureFixture
) -> None:
    """An adapter's card shows a row as text."""

    def is_drained() -> bool:
        with services.database.read() as reading:
            return [one.state for one in daemons.live_daemons(reading)] == ["drained"]

    def lose() -> None:
        wait_until(is_drained)
        services.store.delete("bases")
        undrain(services)

    drain(services)
    check(daemon(), lose, at_step=0)
    assert "life_lost" in caplog.messages
    assert len(list(services.store.path("bases").glob("*/tokenizer.json"))) == 1


@pytest.mark.databases("sqlite")
def test_a_life_erases_what_is_past_its_time_once_the_clock_of_its_process_has_gone_right_for_an_hour(
    daemon: Callable[..., Daemon], services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, boot, passed = time.time, upkeep.boot_time, 0.0
    monkeypatch.setattr(time, "time", lambda: now() + passed)
    monkeypatch.setattr(upkeep, "boot_time", lambda: boot() + passed)
    left = services.store.path("uploads/adp_gone")
    left.mkdir(parents=True)
    os.utime(left, (0, 0))
    one, passed = daemon(), STEADY_SECONDS

    def others() -> None:
        try:
            wait_until(lambda: not left.exists())
        finally:
            one.stopping.set()

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(others)
        assert one.run() == 0
        done.result()


def test_who_cannot_ask_whether_a_newer_version_was_there_has_met_an_outage() -> None:
    with pytest.raises(DBAPIError) as raised:
        refuse_newer(Database(make_url("sqlite:////nowhere/mixloom.db")))
    assert session.is_outage(raised.value)


def test_a_daemon_that_meets_what_a_newer_version_has_written_ends_and_fails_no_job(
    life: Life,
    new_life: Callable[..., Life],
    daemon: Callable[..., Daemon],
    alice: Caller,
    services: Services,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As one that was left running when others were upgraded."""

    def execute(statement: str, **values: str) -> Any:
        with services.database.write() as writing:
            return writing.execute(text(statement), values)

    id_ = submit(alice, PLAIN, steps=12)
    life.turn_until(lambda: bool(life.roster.residents) and life.step_of(id_) == 11)
    life.books.end()
    files = [services.store.path(f"{point.key}/run.json") for point in points(services, id_)]
    known, states = execute("SELECT version_num FROM alembic_version").scalar(), [file.read_text() for file in files]

    def write(revision: str, texts: list[str]) -> None:
        execute("UPDATE alembic_version SET version_num = :revision", revision=revision)
        for file, state in zip(files, texts, strict=True):
            file.write_text(state)
        with services.database.write() as writing:
            for point in writing.query(t.RecoveryPoint):
                point.manifest = manifest(services.store.path(point.key))

    try:
        write("9999", [state.replace('"schema": 2', '"schema": 99') for state in states])
        with pytest.raises(MixloomError, match="written by a newer version"):
            daemon().run()
        with services.database.read() as reading:
            assert [run.crashes for run in reading.query(t.Run)] == [0]
        assert (job(services, id_).status, len(points(services, id_))) == ("queued", 2)
        if services.database.path:  # the newer tables do not even take the end of the life
            execute("CREATE TRIGGER t BEFORE UPDATE OF ended_at ON daemons BEGIN SELECT RAISE(ABORT, 'newer'); END")
            with pytest.raises(MixloomError, match="written by a newer version"):
                daemon().run()
            assert "lease_not_ended" in caplog.messages
            execute("DROP TRIGGER t")
    finally:
        write(known, states)
    new_life().finish()
    assert job(services, id_).status == "succeeded"


@pytest.mark.slow
@pytest.mark.databases("postgresql")
def test_a_network_that_swallows_everything_costs_time_and_no_byte(
    check: Check,
    daemon: Callable[..., Daemon],
    services: Services,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """First the connections that are there are given up, then those that are tried."""
    monkeypatch.setattr(session, "SILENT_SECONDS", 1)
    relay = Relay(services.database.url)

    def swallow() -> None:
        relay.swallow()
        wait_until(lambda: caplog.messages.count("life_lost") == 2)
        relay.flow()

    check(daemon(database_url=relay.url), swallow)
    relay.end()


class SmallFile:
    """SQLite's file grows no further while its disk is full."""

    most_pages = WITHOUT_END

    def __init__(self) -> None:
        event.listen(Pool, "checkout", self._limit)

    def fill(self) -> None:
        self.most_pages = 1  # which SQLite takes for as many as there are

    def free(self) -> None:
        self.most_pages = WITHOUT_END

    def end(self) -> None:
        event.remove(Pool, "checkout", self._limit)

    def _limit(self, connection: Any, *_: Any) -> None:
        connection.execute(f"PRAGMA max_page_count={self.most_pages}")


class SmallDisk:
    """A small disk for the tables of PostgreSQL that grow here."""

    TABLES = ("metrics", "datasets")

    def __init__(self, server: PostgreSQL, database: str):
        self.server = server
        self.database = database
        self.folder = server.new_folder()
        mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", self.folder], capture_output=True)
        if mount.returncode:
            pytest.skip(f"needs to mount a small disk: {mount.stderr.decode().strip()}")
        server.own(self.folder)
        server.execute(f"CREATE TABLESPACE small LOCATION '{self.folder}'")
        self._move("small")
        server.execute("ALTER TABLE metrics SET (fillfactor = 10)", database)  # a few rows more need room

    def fill(self) -> None:
        with suppress(OSError), (self.folder / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(1024)):
                pass

    def free(self) -> None:
        (self.folder / "filler").unlink()

    def end(self) -> None:
        self.server.execute("ALTER TABLE metrics RESET (fillfactor)", self.database)
        self._move("pg_default")
        self.server.execute("DROP TABLESPACE small")
        subprocess.run(["umount", self.folder], check=True)

    def _move(self, tablespace: str) -> None:
        for table in self.TABLES:
            self.server.execute(f"ALTER TABLE {table} SET TABLESPACE {tablespace}", self.database)


@pytest.fixture
def own_disk(request: pytest.FixtureRequest, services: Services) -> Iterator[SmallFile | SmallDisk]:
    """The database's own disk."""
    if services.database.path is None:
        one: SmallFile | SmallDisk = SmallDisk(
            request.getfixturevalue("postgresql"), str(services.database.url.database)
        )
    else:
        one = SmallFile()
    yield one
    one.end()


def test_a_database_whose_own_disk_is_full_costs_time_and_no_byte(
    own_disk: SmallFile | SmallDisk,
    check: Check,
    daemon: Callable[..., Daemon],
    alice: Caller,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fill() -> None:
        own_disk.fill()
        wait_until(lambda: "life_lost" in caplog.messages)
        answer = first_refusal(alice)
        assert (answer.status_code, answer.json()["error"]["code"]) == (507, "disk_full")
        assert alice.get("/jobs").status_code == 200, "what is there can be read"
        own_disk.free()

    check(daemon(), fill)
    upload(alice, prompt_rows(3))


def first_refusal(alice: Caller) -> Any:
    """Of an upload: rows may still fit where there is room in the tables."""
    for _ in range(100):
        answer = alice.post("/datasets", files={"file": ("rows.jsonl", '{"text": "a"}')})
        if answer.status_code != 201:
            return answer
    raise AssertionError("there is always room")


class Clock:
    """The database's clock, as statements read it, so many seconds ahead."""

    ahead = 0.0

    def __init__(self) -> None:
        event.listen(Pool, "checkout", self._set)

    def end(self) -> None:
        event.remove(Pool, "checkout", self._set)

    def _set(self, connection: Any, *_: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.create_function("julianday", 1, lambda _now: (time.time() + self.ahead) / 86400 + 2440587.5)
        else:
            connection.execute(f"SET jump.ahead = '{self.ahead}'; SET search_path = public, jump, pg_catalog")
            connection.commit()


_JUMP = """CREATE SCHEMA jump;
CREATE FUNCTION jump.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS
$$ SELECT pg_catalog.clock_timestamp() + make_interval(secs => current_setting('jump.ahead')::double precision) $$"""


@pytest.fixture
def clock(request: pytest.FixtureRequest, services: Services) -> Iterator[Clock]:
    name = None if services.database.path else str(services.database.url.database)
    if name:
        postgresql: PostgreSQL = request.getfixturevalue("postgresql")
        postgresql.execute(_JUMP, name)
    one = Clock()
    yield one
    one.end()
    if name:
        postgresql.execute("DROP SCHEMA jump CASCADE", name)


DAY = 86400.0


@pytest.mark.parametrize("ahead", [DAY, -DAY])
def test_a_clock_of_the_database_that_jumps_costs_no_byte_and_blames_nobody(
    ahead: float,
    check: Check,
    daemon: Callable[..., Daemon],
    services: Services,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A day ahead the lease is over, unless a heartbeat comes first: these are far apart. A day back it goes on."""

    def jump() -> None:
        clock.ahead = ahead
        if ahead > 0:
            wait_until(lambda: "life_lost" in caplog.messages)

    check(daemon(lease_seconds=3600), jump)
    assert ("life_lost" in caplog.messages) is (ahead > 0)
    with services.database.read() as reading:
        assert set(reading.scalars(select(t.Run.crashes))) == {0}


@pytest.mark.databases("postgresql")
def test_a_clock_that_jumps_ahead_lets_no_daemon_blame_what_another_holds(
    life: Life, alice: Caller, services: Services, clock: Clock
) -> None:
    submit(alice, PLAIN)
    life.turn(2)
    other = Books.begin(services.database, lease_seconds=60.0)
    other.renew()
    clock.ahead = DAY
    other.renew()
    with services.database.read() as reading:
        assert reading.scalars(select(t.Job.status)).all() == ["queued"]
        assert reading.scalars(select(t.Run.crashes)).all() == [0]
