"""A job is bound to the base that it was submitted for."""

from pathlib import Path

from tests.base_folder import write_tiny_base
from tests.e2e.conftest import NewServer
from tests.e2e.making import MIXTURE, PLAIN, dataset, submit
from tests.e2e.server import wait_for

STEPS = 30


def test_under_another_base_a_job_waits_and_under_its_own_it_goes_on_to_the_same_bytes(
    new_server: NewServer, base: Path, tmp_path: Path
) -> None:
    server = new_server().start()
    client = server.tenant("alice")
    data = dataset(client, tmp_path)
    (undisturbed,) = server.finish(submit(client, data, MIXTURE, STEPS))
    job = submit(client, data, MIXTURE, STEPS)
    wait_for(lambda: server.step(job) >= 3)
    client.jobs.pause(job)
    wait_for(lambda: server.status(job) == "paused")
    first = client.base()["hash"]

    assert server.stop() == 0
    server.base = write_tiny_base(tmp_path / "other", seed=8)
    server.start()
    assert client.base()["hash"] != first
    waiting = client.jobs.resume(job)
    assert (waiting["status"], waiting["queue"]["reason"]) == ("queued", "waiting_for_base")
    assert waiting["queue"]["sentence"]
    rested = server.step(job)
    server.finish(submit(client, dataset(client, tmp_path), PLAIN, 3))
    assert (server.status(job), server.step(job)) == ("queued", rested)

    assert server.stop() == 0
    server.base = base
    server.start()
    assert server.finish(job) == [undisturbed]
    assert server.metric_steps(job) == list(range(1, STEPS + 1))
    assert client.jobs.get(job)["exact"] is True
