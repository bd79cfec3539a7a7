"""The writing protocol at each of its crash points, and a disk without room, on the real processes."""

import resource
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mixloom import MixloomError
from server import doctor
from server.db.session import Database
from server.faults import Fault, arm
from server.settings import Settings
from server.store import LocalStore
from tests.e2e.conftest import BOTH, database
from tests.e2e.making import MIXTURE, PLAIN, dataset, submit
from tests.e2e.server import Server, wait_for

STEPS = 40
PUTS = ("put.written", "put.synced", "put.renamed", "put.published")


def twins(server: Server, folder: Path) -> list[str]:
    client = server.tenant("alice")
    data = dataset(client, folder)
    return [submit(client, data, adapter, STEPS) for adapter in (MIXTURE, PLAIN)]


@pytest.fixture(scope="module", params=BOTH)
def server(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("disk"), base, **database(request))
    try:
        yield server.start()
    finally:
        server.end()


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> list[str]:
    return server.finish(*twins(server, server.folder))


def findings(server: Server) -> list[doctor.Finding]:
    settings = Settings(data_dir=server.data, database_url=server.settings.get("database_url"))
    return doctor.examine(Database(settings.database), LocalStore(server.data))


@pytest.mark.slow
def test_killed_at_every_point_of_a_write_the_daemon_loses_no_bit_and_leaves_nothing(
    server: Server, undisturbed: list[str], tmp_path: Path
) -> None:
    """In rounds: four deaths in one place would fail the jobs."""
    for round_ in [*([(point, "recovery"), (point, "adapters")] for point in PUTS), [("point.published", "")]]:
        arm(server.faults, *(Fault(point=point, kind="kill", about=place) for point, place in round_))
        jobs = twins(server, tmp_path)
        assert server.finish(*jobs, seconds=300) == undisturbed
        assert '"times": 1' not in server.faults.read_text(), "every one has struck"
        assert [server.metric_steps(job) for job in jobs] == [list(range(1, STEPS + 1))] * 2
    wait_for(lambda: not list((server.data / "recovery").glob("*/*")))
    assert findings(server) == []


def test_a_server_that_may_write_nothing_refuses_what_is_new_waits_and_goes_on_when_it_may(
    server: Server, undisturbed: list[str], tmp_path: Path
) -> None:
    """RLIMIT_FSIZE: EFBIG for files, SQLITE_IOERR_WRITE for the database."""
    client = server.tenant("alice")
    jobs = twins(server, tmp_path)
    num_sets = len(client.datasets.list())
    wait_for(lambda: min(map(server.step, jobs)) >= 7)
    assert server.process is not None
    daemon, api = psutil.Process(server.daemon_pid), psutil.Process(server.process.pid)
    _, most = daemon.rlimit(resource.RLIMIT_FSIZE)
    for process in (daemon, api):
        process.rlimit(resource.RLIMIT_FSIZE, (0, most))
    (data, *_) = client.datasets.list()
    for send in (lambda: dataset(client, tmp_path), lambda: submit(client, data["id"], PLAIN, STEPS)):
        with pytest.raises(MixloomError) as caught:
            send()
        assert (caught.value.status, caught.value.code) == (507, "disk_full")
    if "database_url" in server.settings:
        wait_for(lambda: {client.jobs.get(job)["queue"]["reason"] for job in jobs} == {"disk"})
    else:  # its heart cannot be written either
        wait_for(lambda: server.admin.ready()["status"] == "not_ready")
    assert {client.jobs.get(job)["status"] for job in jobs} <= {"running", "queued"}, "what is there can be read"
    assert len(client.datasets.list()) == num_sets, "none by halves"
    for process in (daemon, api):
        process.rlimit(resource.RLIMIT_FSIZE, (most, most))
    assert server.finish(*jobs) == undisturbed
    assert server.daemon_pid == daemon.pid, "it was never started anew"
    assert [server.metric_steps(job) for job in jobs] == [list(range(1, STEPS + 1))] * 2
    assert findings(server) == []
