"""A daemon that nobody supervises ends as one under `serve` does, and blames no job for it."""

import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from mixloom import MixloomError
from server.faults import Fault, arm
from tests.e2e.making import PLAIN, dataset, submit
from tests.e2e.server import START_POLL_SECONDS, START_SECONDS, Server, wait_for

WAITS = {"status": "queued", "crashes": 0}


@pytest.fixture(scope="module")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An API alone, and recovery points only where an end makes them."""
    server = Server(tmp_path_factory.mktemp("lone"), base, recovery_steps=0)
    try:
        server.spawn("api")
        wait_for(lambda: answers(server), START_SECONDS, every=START_POLL_SECONDS, why=lambda: server.log)
        yield server
    finally:
        server.end()


def answers(server: Server) -> bool:
    try:
        return server.admin.admin.queue() == []
    except MixloomError:
        return False


@pytest.fixture
def daemon(request: pytest.FixtureRequest, server: Server) -> Iterator[Popen[bytes]]:
    """At work, without a supervisor; a parameter is its `stop_seconds`."""
    server.settings["stop_seconds"] = getattr(request, "param", 30)
    daemon = server.spawn_daemon()
    ready = "SELECT * FROM daemons WHERE pid = ? AND state = 'ready' AND ended_at IS NULL"
    wait_for(lambda: server.rows(ready, daemon.pid), START_SECONDS, every=START_POLL_SECONDS, why=lambda: server.log)
    yield daemon
    daemon.kill()
    daemon.wait()


@pytest.fixture
def job(server: Server, daemon: Popen[bytes], tmp_path: Path) -> Iterator[str]:
    """One that trains."""
    client = server.tenant("alice")
    job = submit(client, dataset(client, tmp_path), PLAIN, 10_000)
    wait_for(lambda: server.step(job) >= 3)
    yield job
    client.jobs.cancel(job)


def state(server: Server, job: str) -> dict[str, Any]:
    return server.rows("SELECT status, crashes FROM jobs JOIN runs ON job_id = jobs.id WHERE job_id = ?", job)[0]


@pytest.fixture
def hung(server: Server, daemon: Popen[bytes], job: str) -> Popen[bytes]:
    """It has the job in memory and does not get as far as to save it."""
    arm(server.faults, Fault(point="pass.begin", kind="hang"))
    wait_for(lambda: '"times": 0' in server.faults.read_text())
    assert server.status(job) == "running"
    return daemon


def end_twice(daemon: Popen[bytes]) -> int:
    """Two signals; the exit code."""
    daemon.terminate()
    time.sleep(0.5)
    assert daemon.poll() is None
    daemon.terminate()
    return daemon.wait(20)


def test_ctrl_c_saves_the_work_of_a_lone_daemon_and_ends_it(server: Server, daemon: Popen[bytes], job: str) -> None:
    assert (server.data / "daemon.lock").read_text() == str(daemon.pid), "it names no supervisor that could be gone"
    daemon.send_signal(signal.SIGINT)
    assert daemon.wait(60) == 0
    assert state(server, job) == WAITS
    saved = "SELECT MAX(step) AS step FROM recovery_points JOIN runs ON runs.id = run_id WHERE job_id = ?"
    assert server.rows(saved, job) == [{"step": server.step(job)}]


def test_a_second_sigterm_ends_a_lone_daemon_at_once_and_no_job_is_to_blame(
    server: Server, hung: Popen[bytes], job: str
) -> None:
    assert end_twice(hung) == 1
    assert state(server, job) == WAITS
    assert server.newest_daemon()["state"] == "stopped"  # type: ignore[index]


@pytest.mark.parametrize("daemon", [2], indirect=True)
def test_a_lone_daemon_that_has_not_saved_in_time_ends_and_no_job_is_to_blame(
    server: Server, hung: Popen[bytes], job: str
) -> None:
    began = time.monotonic()
    hung.terminate()
    assert hung.wait(20) == 1
    assert time.monotonic() - began >= 2
    assert state(server, job) == WAITS
    assert server.newest_daemon()["state"] == "stopped"  # type: ignore[index]


@pytest.mark.slow
def test_a_second_sigterm_ends_a_lone_daemon_although_the_database_does_not_answer(
    server: Server, hung: Popen[bytes]
) -> None:
    with closing(sqlite3.connect(server.data / "mixloom.db", timeout=60)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert end_twice(hung) == 1
