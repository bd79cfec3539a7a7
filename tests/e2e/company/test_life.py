"""The life of jobs over the live server: company, pauses, ends."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixloom import MixloomError
from tests.e2e.making import MIXTURE, NARROW, PLAIN, WIDE, dataset, submit
from tests.e2e.server import Server, wait_for


def test_a_job_submitted_while_others_train_steps_in_the_first_or_second_gang_after_the_answer(
    server: Server, tmp_path: Path
) -> None:
    first, second = server.tenant("early"), server.tenant("late")
    busy = [submit(first, dataset(first, tmp_path), adapter, 400) for adapter in (MIXTURE, PLAIN)]
    data = dataset(second, tmp_path)
    try:
        wait_for(lambda: min(server.step(job) for job in busy) >= 5)
        late = submit(second, data, WIDE, 3)
        answered = time.time()
        wait_for(lambda: server.step(late) >= 1)
        gang = server.rows("SELECT gang FROM metrics WHERE job_id = ? AND step = 1", late)[0]["gang"]
        ended = server.rows(
            "SELECT COUNT(DISTINCT gang) AS count FROM metrics WHERE created_at > ? AND gang <= ?", answered, gang
        )
        assert ended[0]["count"] <= 3, "the gang under way at the answer, and two that began after it"
        server.finish(late)
        assert {server.status(job) for job in busy} == {"running"}
        assert second.jobs.download_adapter(late, tmp_path / "late.zip").read_bytes()[:2] == b"PK"
    finally:
        for job in busy:
            first.jobs.cancel(job)


STEPS = 60
SAME = (MIXTURE, PLAIN)


def submit_same(server: Server, folder: Path) -> list[str]:
    client = server.tenant("same")
    return [submit(client, dataset(client, folder), adapter, STEPS) for adapter in SAME]


@pytest.fixture(scope="module")
def alone(server: Server, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the jobs of `submit_same` come to when nobody else is there but each other."""
    return server.finish(*submit_same(server, tmp_path_factory.mktemp("alone")))


@pytest.fixture(scope="module")
def narrow(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that trains one job at a time, in gangs of a few rows.

    What it is for, quick tests see without a start of its own: tests/server/daemon/test_company.py the budget,
    tests/e2e/interrupted/test_base.py a restart.
    """
    server = Server(tmp_path_factory.mktemp("narrow"), base, token_budget=256, max_resident_runs=1)
    try:
        yield server.start()
    finally:
        server.end()


def test_an_adapter_does_not_hang_on_its_company(server: Server, alone: list[str], tmp_path: Path) -> None:
    neighbour = server.tenant("neighbour")
    data = dataset(neighbour, tmp_path, rows=24, word="Who")
    others = [submit(neighbour, data, adapter, 200, training={"batch_size": 6}) for adapter in (WIDE, NARROW)]
    wait_for(lambda: min(server.step(job) for job in others) >= 2)
    assert server.finish(*submit_same(server, tmp_path)) == alone
    for job in others:
        neighbour.jobs.cancel(job)


@pytest.mark.databases("sqlite")
@pytest.mark.slow
def test_an_adapter_does_not_hang_on_the_budget_of_a_gang(narrow: Server, alone: list[str], tmp_path: Path) -> None:
    assert narrow.finish(*submit_same(narrow, tmp_path)) == alone


@pytest.mark.databases("sqlite")
@pytest.mark.slow
def test_a_restart_forgets_neither_who_waits_nor_who_is_paused(
    narrow: Server, alone: list[str], tmp_path: Path
) -> None:
    client = narrow.tenant("same")
    paused, other = submit_same(narrow, tmp_path)
    wait_for(lambda: narrow.step(paused) >= 3)
    assert client.jobs.pause(paused)["requested"] == "pause"
    wait_for(lambda: narrow.status(paused) == "paused")
    rested = narrow.step(paused)
    waiting = submit(client, dataset(client, tmp_path), NARROW, 5)
    wait_for(lambda: narrow.step(other) >= 3)
    narrow.kill("api", "daemon")
    narrow.start()
    assert client.jobs.get(waiting)["status"] == "queued"
    narrow.finish(other, waiting)
    assert (narrow.status(paused), narrow.step(paused)) == ("paused", rested)
    assert client.jobs.get(paused)["requested"] is None
    client.jobs.resume(paused)
    assert narrow.finish(paused, other) == alone
    assert narrow.metric_steps(paused) == list(range(1, STEPS + 1))
    kinds = [event["kind"] for event in client.jobs.events(paused)]
    assert [kinds.count(kind) for kind in ("paused", "resumed", "succeeded")] == [1, 1, 1]


def test_a_cancelled_job_takes_no_step_more_and_disturbs_nobody(server: Server, tmp_path: Path) -> None:
    client = server.tenant("cancelling")
    data = dataset(client, tmp_path)
    job, other = submit(client, data, MIXTURE, 400), submit(client, data, PLAIN, 30)
    wait_for(lambda: server.step(job) >= 3)
    assert client.jobs.cancel(job)["status"] == "cancelled"
    last = server.step(job)
    server.finish(other)
    assert (server.status(job), server.step(job), server.metric_steps(job)[-1]) == ("cancelled", last, last)
    with pytest.raises(MixloomError, match="cannot be resumed"):
        client.jobs.resume(job)
    run = server.rows("SELECT id FROM runs WHERE job_id = ?", job)[0]["id"]
    wait_for(lambda: not (server.data / "recovery" / run).exists())


def test_a_deleted_job_is_gone_with_its_files_while_others_train(server: Server, tmp_path: Path) -> None:
    client = server.tenant("deleting")
    data = dataset(client, tmp_path)
    job, other = submit(client, data, MIXTURE, 400), submit(client, data, PLAIN, 30)
    wait_for(lambda: server.step(job) >= 7)
    client.jobs.cancel(job)
    client.jobs.delete(job)
    with pytest.raises(MixloomError) as caught:
        client.jobs.get(job)
    assert caught.value.status == 404
    server.finish(other)
    assert not (server.data / "jobs" / job).exists()
    assert not server.rows("SELECT * FROM adapters WHERE job_id = ?", job)
    assert not server.rows("SELECT * FROM recovery_points WHERE run_id NOT IN (SELECT id FROM runs)")
