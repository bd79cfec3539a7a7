"""Two servers on one data directory with SQLite: one daemon trains. On PostgreSQL both would."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.making import PLAIN, dataset, submit
from tests.e2e.server import Server, wait_for

pytestmark = pytest.mark.databases("sqlite")


@pytest.fixture
def second(server: Server, base: Path) -> Iterator[Server]:
    """On the same data with a port of its own, not yet started."""
    second = Server(server.folder, base)
    yield second
    second.end()


def test_a_second_server_on_the_same_data_waits_and_takes_over(server: Server, second: Server, tmp_path: Path) -> None:
    client = server.tenant("alice")
    data = dataset(client, tmp_path)
    (undisturbed,) = server.finish(submit(client, data, PLAIN, 60))
    before = len(second.log)
    second.spawn()
    wait_for(lambda: "waiting_for_lock" in second.log[before:], 60)
    job = submit(client, data, PLAIN, 60)
    wait_for(lambda: server.step(job) >= 12)
    assert second.admin.ready()["status"] == "ready", "its API serves the first one's daemon"
    server.kill("api")
    second.wait_until_ready()
    assert second.finish(job) == [undisturbed]
    assert second.metric_steps(job) == list(range(1, 61))
