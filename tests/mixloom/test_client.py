"""`Client` against the real API."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mixloom import Client, MixloomError, ServerUnreachable
from mixloom.transport import Transport
from server.api.services import Services
from tests.server.making import add_metric

ROWS = [{"prompt": f"What is {n} and {n}?", "completion": f"{2 * n}"} for n in range(20)]


def submit(client: Client, name: str = "sums") -> str:
    dataset = client.datasets.upload(ROWS, name=name)
    job = client.jobs.submit(dataset=dataset["id"], name=name, training={"max_steps": 3})
    id_: str = job["id"]
    return id_


def test_importing_the_client_brings_no_torch_and_nothing_of_the_server() -> None:
    code = "import mixloom.cli.main, sys; print({'torch', 'server', 'fastapi', 'engine'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_rows_go_up_and_come_back(alice: Client, tmp_path: Path) -> None:
    dataset = alice.datasets.upload(ROWS, name="sums")
    assert (dataset["rows"], dataset["name"]) == (20, "sums")
    assert [one["row"] for one in alice.datasets.rows(dataset["id"], limit=50)] == ROWS
    saved = alice.datasets.content(dataset["id"], tmp_path / "back.jsonl")
    assert saved.read_text().count("\n") == 20
    assert not list(tmp_path.glob("*.part"))
    alice.datasets.delete(dataset["id"])
    assert alice.datasets.list() == []


def test_lists_go_on_over_all_pages_in_the_order_asked(alice: Client) -> None:
    ids = [alice.datasets.upload(ROWS[:2], name=f"number {n}")["id"] for n in range(105)]
    assert [one["id"] for one in alice.datasets.iterate(order="asc")] == ids
    assert [one["id"] for one in alice.datasets.iterate()] == ids[::-1]
    assert [one["id"] for one in alice.datasets.list(limit=102)] == ids[:2:-1]
    assert [one["name"] for one in alice.datasets.list(name="number 7")] == ["number 7"]


def test_an_estimate_makes_nothing_and_a_clone_is_like_its_original(alice: Client) -> None:
    dataset = alice.datasets.upload(ROWS)
    assert alice.jobs.estimate(dataset=dataset["id"], training={"max_steps": 3})["steps"] == 3
    assert alice.jobs.list() == []
    original = alice.jobs.submit({"dataset": dataset["id"]}, training={"max_steps": 3, "seed": 7})
    clone = alice.jobs.clone(original["id"], name="again")
    assert (clone["training"], clone["name"]) == (original["training"], "again")


def test_losses_of_each_set_of_a_mixture_are_in_its_metrics_by_id(alice: Client, services: Services) -> None:
    ids = [alice.datasets.upload(ROWS)["id"] for _ in range(2)]
    job = alice.jobs.submit(dataset=[{"id": id_, "weight": 1} for id_ in ids], training={"max_steps": 3})["id"]
    add_metric(services, job, 1, train_losses=[0.5, None])
    (row,) = alice.jobs.metrics(job)
    assert [row[f"train_loss.{id_}"] for id_ in ids] == [0.5, None]


def test_a_job_is_steered_and_forgotten(alice: Client) -> None:
    job = submit(alice)
    assert alice.jobs.pause(job)["status"] == "paused"
    assert alice.jobs.resume(job)["status"] == "queued"
    assert alice.jobs.cancel(job)["status"] == "cancelled"
    assert alice.jobs.wait(job)["status"] == "cancelled"
    events = [event["kind"] for event in alice.jobs.events(job)]
    assert events[0] == "queued"
    assert "cancelled" in events
    assert alice.jobs.metrics(job) == []
    assert alice.jobs.checkpoints(job) == []
    alice.jobs.delete(job)
    with pytest.raises(MixloomError) as caught:
        alice.jobs.get(job)
    assert (caught.value.code, caught.value.status) == ("not_found", 404)


def test_a_job_is_found_by_id_by_its_beginning_and_by_name(alice: Client) -> None:
    first, second = submit(alice, "one"), submit(alice, "two")
    for reference in (first, first[:14], first[4:14], "one"):
        assert alice.jobs.find(reference)["id"] == first
    with pytest.raises(MixloomError) as caught:
        alice.jobs.find("job_")
    assert caught.value.code == "ambiguous_job"
    assert second in caught.value.message
    with pytest.raises(MixloomError) as caught:
        alice.jobs.find("three")
    assert caught.value.code == "not_found"


def test_watching_ends_when_every_job_has_ended(alice: Client, finish: Callable[[str], str]) -> None:
    jobs = [submit(alice, "one"), submit(alice, "two")]
    seen = []
    for states in alice.jobs.watch(jobs, seconds=0.01):
        seen.append([job["status"] for job in states])
        if len(seen) == 1:
            finish(jobs[0])
        if len(seen) == 2:
            alice.jobs.cancel(jobs[1])
    assert seen[0] == ["queued", "queued"]
    assert seen[-1] == ["succeeded", "cancelled"]


def test_an_adapter_is_downloaded_whole_or_not_at_all(
    alice: Client, finish: Callable[[str], str], tmp_path: Path
) -> None:
    job = submit(alice)
    with pytest.raises(MixloomError) as caught:
        alice.jobs.download_adapter(job, tmp_path)
    assert caught.value.code == "no_adapter_yet"
    assert list(tmp_path.glob("*.zip*")) == []
    adapter = finish(job)
    assert alice.jobs.download_adapter(job, tmp_path) == tmp_path / f"{job}.zip"
    assert alice.adapters.download(adapter, tmp_path / "deep" / "a.zip").stat().st_size > 100
    assert [file["name"] for file in alice.adapters.files(adapter)] == ["README.md"]
    assert alice.adapters.download_file(adapter, "README.md", tmp_path / "R.md").read_text() == "An adapter.\n"
    assert [one["id"] for one in alice.jobs.checkpoints(job)] == [adapter]
    assert alice.adapters.get(adapter)["source"]["job"] == job
    alice.adapters.delete(adapter)
    assert alice.adapters.list() == []


def test_an_error_carries_all_that_the_server_said(alice: Client) -> None:
    with pytest.raises(MixloomError) as caught:
        alice.datasets.upload([{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
    error = caught.value
    assert error.status == 422
    assert error.details[0]["line"] == 2
    assert error.request_id is not None
    assert str(error) == error.message


def test_the_operator_manages_tenants_keys_and_drains(operator: Client, base: object) -> None:
    tenant = operator.admin.create_tenant("bob", share=2)
    assert Client(operator.url, tenant["key"]).me()["share"] == 2
    assert operator.admin.change_tenant(tenant["id"], share=3)["share"] == 3
    key = operator.admin.create_key(tenant["id"], "laptop")
    assert {one["name"] for one in operator.admin.keys(tenant["id"])} == {"first key", "laptop"}
    operator.admin.revoke_key(tenant["id"], key["id"])
    with pytest.raises(MixloomError) as caught:
        Client(operator.url, key["key"]).me()
    assert caught.value.status == 401
    job = submit(Client(operator.url, tenant["key"]))
    assert [entry["id"] for entry in operator.admin.queue()] == [job]
    assert operator.admin.drain("graceful", deadline_seconds=60, reason="a new disk")["draining"]
    assert operator.admin.current_drain()["reason"] == "a new disk"
    assert not operator.admin.undrain()["draining"]
    (daemon,) = operator.admin.daemons()
    assert operator.admin.drain(daemon=daemon["name"])["at_rest"] is False
    assert operator.admin.current_drain(daemon["name"])["daemon"] == daemon["name"]
    assert not operator.admin.undrain(daemon["name"])["draining"]
    assert [daemon["state"] for daemon in operator.admin.daemons()] == ["ready"]
    operator.admin.delete_tenant(tenant["id"])
    assert operator.admin.tenants() == []


def test_a_job_that_is_sent_twice_with_a_key_is_one(alice: Client) -> None:
    dataset = alice.datasets.upload(ROWS)["id"]
    first, again, other = (alice.jobs.submit(dataset=dataset, idempotency_key=key) for key in ("k", "k", None))
    assert first["id"] == again["id"] != other["id"]


def test_readiness_is_an_answer_and_not_an_exception(url: str) -> None:
    answer = Client(url).ready()
    assert answer["status"] == "not_ready"
    assert answer["reasons"]


def test_a_read_is_tried_again_when_the_connection_breaks_and_a_write_only_with_a_key(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("mixloom.transport.time.sleep", pauses.append)
    nobody = Transport("http://127.0.0.1:9", None, timeout=1)
    with pytest.raises(ServerUnreachable):
        nobody.post("/jobs", {})
    assert pauses == []
    with pytest.raises(ServerUnreachable) as caught:
        nobody.get("/jobs")
    assert pauses == [0.2, 0.8]
    with pytest.raises(ServerUnreachable):
        nobody.post_once("/jobs", {}, "key")
    assert pauses == [0.2, 0.8] * 2
    assert caught.value.status is None
