"""The operator's wish that nothing trains: nothing is lost, everybody is told, and it outlives restarts."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixloom import MixloomError
from server.faults import Fault, arm
from tests.e2e.command_line import mixloom
from tests.e2e.conftest import BOTH, NewServer, database
from tests.e2e.making import MIXTURE, PLAIN, WIDE, dataset, submit
from tests.e2e.server import ADMIN_KEY, Server, is_gone, is_stopped, wait_for

ADAPTERS = (MIXTURE, PLAIN)
STEPS = 80


@pytest.fixture(scope="module", params=BOTH)
def drained(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for this module's drains; recovery points come only where a drain makes them."""
    server = Server(tmp_path_factory.mktemp("drain"), base, recovery_steps=0, **database(request))
    try:
        yield server.start()
    finally:
        server.end()


def submit_same(server: Server, folder: Path) -> list[str]:
    client = server.tenant("alice")
    return [submit(client, dataset(client, folder), adapter, STEPS) for adapter in ADAPTERS]


@pytest.fixture(scope="module")
def undisturbed(drained: Server, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return drained.finish(*submit_same(drained, tmp_path_factory.mktemp("undisturbed")))


@pytest.fixture
def jobs(drained: Server, undisturbed: list[str], tmp_path: Path) -> Iterator[list[str]]:
    """The same two jobs, a few steps along."""
    ids = submit_same(drained.start(), tmp_path)
    wait_for(lambda: min(drained.step(job) for job in ids) >= 3)
    yield ids
    drained.start()
    drained.admin.admin.undrain()


def check(server: Server, jobs: list[str], undisturbed: list[str]) -> None:
    """Nothing of the drain is left to be seen."""
    assert server.finish(*jobs) == undisturbed
    for job in jobs:
        assert server.metric_steps(job) == list(range(1, STEPS + 1))


def saved_step(server: Server, job: str) -> int | None:
    """The step of a job's newest recovery point."""
    statement = "SELECT MAX(step) AS step FROM recovery_points JOIN runs ON runs.id = run_id WHERE job_id = ?"
    step: int | None = server.rows(statement, job)[0]["step"]
    return step


def admin(server: Server, *arguments: str) -> str:
    """The output of an operator's command."""
    done = mixloom(server, ADMIN_KEY, "admin", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_quick_drain_saves_every_run_and_holds_over_a_restart_until_undrain(
    drained: Server, jobs: list[str], undisturbed: list[str], tmp_path: Path
) -> None:
    client = drained.tenant("alice")
    admin(drained, "drain", "--wait", "--reason", "a new disk")
    steps = [drained.step(job) for job in jobs]
    for job in jobs:
        shown = client.jobs.get(job)
        assert (shown["status"], shown["queue"]["reason"]) == ("queued", "draining")
        assert "a new disk" in shown["queue"]["sentence"]
    late = submit(client, dataset(client, tmp_path), WIDE, 3)
    assert client.jobs.get(late)["queue"]["reason"] == "draining"
    assert drained.admin.admin.daemons()[0]["state"] == "drained"
    assert [saved_step(drained, job) for job in jobs] == steps

    drained.kill("api", "daemon")
    drained.start()
    wait_for(lambda: drained.admin.admin.daemons()[0]["state"] == "drained")
    assert [drained.step(job) for job in [*jobs, late]] == [*steps, 0]
    assert drained.admin.admin.current_drain()["reason"] == "a new disk"

    admin(drained, "undrain")
    check(drained, jobs, undisturbed)
    drained.finish(late)
    assert drained.admin.admin.daemons()[0]["state"] == "ready"


def test_a_graceful_drain_lets_who_trains_finish_and_nobody_new_begin(
    drained: Server, jobs: list[str], undisturbed: list[str], tmp_path: Path
) -> None:
    client = drained.tenant("alice")
    drained.admin.admin.drain("graceful")
    late = submit(client, dataset(client, tmp_path), WIDE, 3)
    check(drained, jobs, undisturbed)
    wait_for(lambda: drained.admin.admin.daemons()[0]["state"] == "drained")
    assert (drained.status(late), drained.step(late)) == ("queued", 0)
    drained.admin.admin.undrain()
    drained.finish(late)


def test_a_graceful_drain_becomes_a_quick_one_at_its_deadline(
    drained: Server, jobs: list[str], undisturbed: list[str]
) -> None:
    drained.admin.admin.drain("graceful", deadline_seconds=0.2)
    wait_for(lambda: drained.admin.admin.daemons()[0]["state"] == "drained")
    assert [drained.status(job) for job in jobs] == ["queued"] * 2
    drained.admin.admin.undrain()
    check(drained, jobs, undisturbed)


def test_a_fast_drain_lets_go_at_once_and_repeats_what_was_not_saved(
    drained: Server, jobs: list[str], undisturbed: list[str]
) -> None:
    drained.admin.admin.drain("fast")
    wait_for(lambda: drained.admin.admin.daemons()[0]["state"] == "drained")
    assert [drained.status(job) for job in jobs] == ["queued"] * 2
    assert [saved_step(drained, job) for job in jobs] == [None, None]
    drained.admin.admin.undrain()
    check(drained, jobs, undisturbed)


def test_a_drain_may_ask_the_daemon_to_end_and_undrain_brings_one_back(
    drained: Server, jobs: list[str], undisturbed: list[str]
) -> None:
    old = drained.daemon_pid
    assert old is not None
    admin(drained, "drain", "--exit", "--wait")
    wait_for(lambda: is_gone(old))
    time.sleep(1)
    assert drained.daemon_pid is None
    shown = drained.tenant("alice").jobs.get(jobs[0])
    assert (shown["status"], shown["queue"]["reason"]) == ("queued", "no_daemon")
    with pytest.raises(MixloomError) as caught:
        drained.tenant("alice").generate("base", "Hello", max_tokens=2)
    assert (caught.value.status, caught.value.code) == (503, "no_daemon")
    admin(drained, "undrain")
    drained.wait_until_ready()
    check(drained, jobs, undisturbed)


def test_a_drain_of_one_daemon_that_asks_it_to_end_holds_beside_a_newer_one_of_all(
    drained: Server, undisturbed: list[str], tmp_path: Path
) -> None:
    client, operator = drained.start().tenant("alice"), drained.admin.admin
    job = submit(client, dataset(client, tmp_path), PLAIN, 10_000)
    wait_for(lambda: drained.step(job) >= 1)
    old, name = drained.daemon_pid, operator.daemons()[0]["name"]
    assert old is not None
    operator.drain("graceful", daemon=name, exit=True)
    operator.drain()
    wait_for(lambda: is_gone(old))
    assert saved_step(drained, job) == drained.step(job)
    operator.undrain()
    time.sleep(1)
    assert drained.daemon_pid is None
    operator.drain()
    operator.undrain(name)
    drained.wait_until_ready()
    wait_for(lambda: operator.daemons()[0]["state"] == "drained")
    client.jobs.cancel(job)
    assert not operator.undrain()["draining"]


def test_sigterm_saves_the_work_and_ends_in_time(drained: Server, jobs: list[str], undisturbed: list[str]) -> None:
    daemon = drained.daemon_pid
    assert daemon is not None
    began, before = time.monotonic(), len(drained.log)
    assert drained.stop() == 0
    assert time.monotonic() - began < 15
    assert "daemon_died" not in drained.log[before:]
    for line in drained.log.splitlines():
        assert line.startswith("Mixloom listens on") or json.loads(line)["event"], "a log of one event a line"
    assert is_gone(daemon)
    assert [drained.status(job) for job in jobs] == ["queued"] * 2
    assert [saved_step(drained, job) for job in jobs] == [drained.step(job) for job in jobs]
    assert drained.newest_daemon()["state"] == "stopped"  # type: ignore[index]
    drained.start()
    assert not drained.admin.admin.current_drain()["draining"]
    check(drained, jobs, undisturbed)


def test_a_daemon_that_has_not_ended_in_time_is_killed_and_no_job_is_to_blame(
    new_server: NewServer, tmp_path: Path
) -> None:
    server = new_server(recovery_steps=0, stop_seconds=1).start()
    assert server.process is not None
    client = server.tenant("alice")
    job = submit(client, dataset(client, tmp_path), PLAIN, 10_000)
    wait_for(lambda: server.step(job) >= 3)
    daemon = server.daemon_pid
    assert daemon is not None
    os.kill(daemon, signal.SIGSTOP)
    wait_for(lambda: is_stopped(daemon))
    began = time.monotonic()
    server.process.terminate()
    assert server.process.wait(40) == 0, "sooner than a supervisor kills a silent daemon"
    assert time.monotonic() - began >= 1
    assert is_gone(daemon)
    assert "daemon_killed" in server.log
    ended = server.rows("SELECT status, crashes FROM jobs JOIN runs ON job_id = jobs.id")
    assert ended == [{"status": "queued", "crashes": 0}]


@pytest.mark.slow
def test_a_second_sigterm_ends_at_once_and_loses_nothing_that_was_saved(
    drained: Server, jobs: list[str], undisturbed: list[str]
) -> None:
    assert drained.process is not None
    daemon = drained.daemon_pid
    assert daemon is not None
    os.kill(daemon, signal.SIGSTOP)  # it will not answer the first one
    drained.process.terminate()
    time.sleep(0.5)
    drained.process.terminate()
    drained.process.wait(10)
    assert is_gone(daemon)
    state = "SELECT status, crashes FROM jobs JOIN runs ON job_id = jobs.id WHERE job_id = ?"
    assert [drained.rows(state, job) for job in jobs] == [[{"status": "queued", "crashes": 0}]] * 2
    drained.start()
    check(drained, jobs, undisturbed)


@pytest.mark.parametrize(("verb", "exit_code"), [("serve", 0), ("daemon", 1)])
def test_a_second_sigterm_ends_what_writes_a_recovery_point_and_loses_nothing_that_was_saved(
    verb: str, exit_code: int, drained: Server, jobs: list[str], undisturbed: list[str]
) -> None:
    """`mixloom daemon` has nobody who would kill it."""
    process = drained.process
    if verb == "daemon":
        assert drained.stop() == 0
        process = drained.spawn_daemon()
    assert process is not None
    saved = [saved_step(drained, job) for job in jobs]
    arm(drained.faults, Fault(point="put.synced", kind="hang", about="recovery"))
    wait_for(lambda: min(drained.step(job) - (step or 0) for job, step in zip(jobs, saved, strict=True)) >= 2)
    process.terminate()
    wait_for(lambda: '"times": 0' in drained.faults.read_text())
    process.terminate()
    assert process.wait(10) == exit_code
    assert [saved_step(drained, job) for job in jobs] == saved
    drained.start()
    check(drained, jobs, undisturbed)
