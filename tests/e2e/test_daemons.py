"""Several daemons, and daemons that die of a job, hang, or are stopped: real processes, and the bytes do not change."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.faults import Fault, arm
from tests.e2e.conftest import database
from tests.e2e.making import MIXTURE, NARROW, PLAIN, WIDE, dataset, submit
from tests.e2e.server import START_SECONDS, Server, is_gone, wait_for
from tests.postgresql import PostgreSQL

STEPS = 40
ADAPTERS = (MIXTURE, PLAIN, WIDE, NARROW)
LEASE_SECONDS = 6.0


ON_BOTH = pytest.mark.parametrize(
    "shared", [pytest.param("sqlite", marks=pytest.mark.slow), "postgresql"], indirect=True
)  # `make test` starts one server here, on which one daemon may overtake another
ON_POSTGRESQL = pytest.mark.parametrize("shared", ["postgresql"], indirect=True)


@pytest.fixture(scope="module")
def shared(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that notices soon what it takes minutes to notice elsewhere."""
    settings = {**database(request), "lease_seconds": LEASE_SECONDS, "hang_seconds": 5, "max_resident_runs": 3}
    server = Server(tmp_path_factory.mktemp("daemons"), base, **settings)
    try:
        yield server.start()
    finally:
        server.end()


@pytest.fixture(scope="module")
def known() -> list[str]:
    return []


@pytest.fixture
def undisturbed(shared: Server, known: list[str]) -> list[str]:
    """The hashes of the jobs where nothing happens: on either kind of database the same."""
    if not known:
        known += shared.finish(*submit_all(shared))
    return known


def submit_all(server: Server) -> list[str]:
    client = server.tenant("alice")
    data = dataset(client, server.folder)
    return [submit(client, data, adapter, STEPS, name=f"job{n}") for n, adapter in enumerate(ADAPTERS)]


def check(server: Server, jobs: list[str], undisturbed: list[str]) -> None:
    assert server.finish(*jobs) == undisturbed
    for job in jobs:
        assert server.metric_steps(job) == list(range(1, STEPS + 1))


@ON_POSTGRESQL
def test_a_stopped_daemon_is_overtaken_and_what_it_still_writes_changes_nothing(
    shared: Server, undisturbed: list[str]
) -> None:
    server = shared
    second = server.spawn_daemon()
    live = "SELECT pid FROM daemons WHERE ended_at IS NULL AND state = 'ready'"
    wait_for(lambda: len(server.rows(live)) == 2, START_SECONDS, why=lambda: server.log[-2000:])
    arm(server.faults, Fault(point="pass.begin", kind="delay", times=10**6))  # until either has come to some
    jobs = submit_all(server)
    holders = (
        "SELECT pid, count(*) AS num FROM jobs JOIN runs ON job_id = jobs.id JOIN daemons ON epoch = lease_epoch "
        "WHERE status = 'running' GROUP BY pid"
    )
    wait_for(lambda: len(server.rows(holders)) == 2, why=lambda: str(server.rows(holders)))
    assert {row["pid"] for row in server.rows(holders)} == {second.pid, server.daemon_pid}
    arm(server.faults)
    wait_for(lambda: min(server.step(job) for job in jobs) >= 2)

    before = len(server.log)
    os.kill(second.pid, signal.SIGSTOP)
    epoch = server.rows("SELECT epoch FROM daemons WHERE pid = ? ORDER BY epoch DESC", second.pid)[0]["epoch"]
    held = "SELECT job_id FROM runs WHERE lease_epoch = ?"
    wait_for(lambda: server.rows("SELECT * FROM daemons WHERE epoch = ? AND ended_at IS NOT NULL", epoch))
    wait_for(lambda: not [row for row in server.rows(held, epoch) if server.status(row["job_id"]) == "running"])
    os.kill(second.pid, signal.SIGCONT)
    lives = "SELECT * FROM daemons WHERE pid = ? AND ended_at IS NULL AND state = 'ready'"
    wait_for(lambda: server.rows(lives, second.pid), why=lambda: server.log[-2000:])
    assert "life_lost" in server.log[before:]
    check(server, jobs, undisturbed)
    assert [one["live"] for one in server.admin.admin.daemons()].count(True) == 2
    late = submit_all(server)
    assert second.poll() is None
    second.terminate()
    assert second.wait(60) == 0
    check(server, late, undisturbed)


@ON_BOTH
@pytest.mark.slow
def test_a_job_that_keeps_killing_the_daemon_is_tried_alone_and_fails_and_the_others_end_as_they_would(
    shared: Server, undisturbed: list[str]
) -> None:
    arm(shared.faults, Fault(point="pass.begin", kind="abort", about="poison", times=99))
    jobs = submit_all(shared)
    client = shared.tenant("alice")
    poison = submit(client, dataset(client, shared.folder), PLAIN, 5, name="poison", priority="high")
    wait_for(lambda: shared.status(poison) == "failed", 300, why=lambda: shared.log[-2000:])
    error = client.jobs.get(poison)["error"]
    assert error["code"] == "crashed_daemon"
    assert "died 4 times" in error["message"]
    check(shared, jobs, undisturbed)
    arm(shared.faults)


@ON_POSTGRESQL
@pytest.mark.slow
def test_undrain_brings_a_daemon_back_although_the_database_was_gone_meanwhile(
    shared: Server, postgresql: PostgreSQL
) -> None:
    shared.admin.admin.drain(exit=True)
    wait_for(lambda: shared.daemon_pid is None)
    postgresql.stop_at_once()
    try:
        wait_for(lambda: "drain_not_known" in shared.log)
    finally:
        postgresql.start()
    shared.admin.admin.undrain()
    shared.wait_until_ready()


@ON_BOTH
def test_a_pass_that_hangs_is_ended_and_the_jobs_go_on(shared: Server, undisturbed: list[str]) -> None:
    before = len(shared.log)
    arm(shared.faults, Fault(point="pass.begin", kind="hang", after=8))
    jobs = submit_all(shared)
    wait_for(lambda: '"hung"' in shared.log[before:], why=lambda: shared.log[-2000:])
    check(shared, jobs, undisturbed)


@ON_BOTH
@pytest.mark.slow
def test_a_daemon_that_is_stopped_is_killed_by_its_supervisor(shared: Server, undisturbed: list[str]) -> None:
    before, jobs = len(shared.log), submit_all(shared)
    wait_for(lambda: min(shared.step(job) for job in jobs) >= 2)
    stopped = shared.daemon_pid
    assert stopped is not None
    os.kill(stopped, signal.SIGSTOP)
    wait_for(lambda: is_gone(stopped))
    assert "daemon_silent" in shared.log[before:]
    check(shared, jobs, undisturbed)
