"""A job is bound to the base that it was submitted for."""

import functools
from pathlib import Path

import pytest

from mixloom import Client, MixloomError
from tests.base_folder import write_tiny_base
from tests.e2e.making import MIXTURE, PLAIN, dataset, submit
from tests.e2e.server import Server, wait_for

STEPS = 30


def refuses_messages(client: Client, folder: Path) -> None:
    """A base without a chat template takes prompts, and no turns."""
    path = folder / "chat.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 4)
    turns = [{"role": "user", "content": "Hello"}]
    for attempt in (
        functools.partial(client.generate, "base", messages=turns, max_tokens=2),
        functools.partial(client.datasets.upload, path),
    ):
        with pytest.raises(MixloomError) as caught:
            attempt()
        assert (caught.value.status, caught.value.code) == (422, "no_chat_template")
    assert client.generate("base", "Hello", max_tokens=2)["usage"]["completion_tokens"] == 2


def test_under_another_base_a_job_waits_and_under_its_own_it_goes_on_to_the_same_bytes(
    server: Server, base: Path, tmp_path: Path
) -> None:
    client = server.tenant("alice")
    data = dataset(client, tmp_path)
    (undisturbed,) = server.finish(submit(client, data, MIXTURE, STEPS))
    job = submit(client, data, MIXTURE, STEPS)
    wait_for(lambda: server.step(job) >= 3)
    client.jobs.pause(job)
    wait_for(lambda: server.status(job) == "paused")
    first = client.base()["hash"]

    assert server.stop() == 0
    server.base = write_tiny_base(tmp_path / "other", seed=8, template=False)
    server.start()
    assert client.base()["hash"] != first
    assert (server.status(job), client.jobs.get(job)["requested"]) == ("paused", None)
    waiting = client.jobs.resume(job)
    assert (waiting["status"], waiting["queue"]["reason"]) == ("queued", "waiting_for_base")
    assert waiting["queue"]["sentence"]
    rested = server.step(job)
    server.finish(submit(client, dataset(client, tmp_path), PLAIN, 3))
    refuses_messages(client, tmp_path)
    assert (server.status(job), server.step(job)) == ("queued", rested)

    assert server.stop() == 0
    server.base = base
    server.start()
    assert server.finish(job) == [undisturbed]
    assert server.metric_steps(job) == list(range(1, STEPS + 1))
    assert client.jobs.get(job)["exact"] is True
    kinds = [event["kind"] for event in client.jobs.events(job)]
    assert [kinds.count(kind) for kind in ("paused", "resumed", "succeeded")] == [1, 1, 1]
