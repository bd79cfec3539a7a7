"""Jobs stopped, resumed, forgotten; why they wait, and for how long."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from server.api.services import Services
from server.db import drains, recovery_points
from server.db.queue import MOST_ADDED
from server.db.tables import Base, Daemon, Event, Metric, RecoveryPoint, Run
from server.states import TRANSITIONS, JobStatus
from tests.server.conftest import Caller
from tests.server.making import add_adapter, add_metric, change_job, submit

pytestmark = pytest.mark.usefixtures("base")


def events_of(caller: Caller, job_id: str) -> list[str]:
    answer = caller.get(f"/jobs/{job_id}/events", params={"order": "asc", "limit": 100})
    return [event["kind"] for event in answer.json()["data"]]


def test_cancel_is_final_in_the_answer_and_idempotent(alice: Caller) -> None:
    job = submit(alice)["id"]
    first, second = alice.post(f"/jobs/{job}/cancel"), alice.post(f"/jobs/{job}/cancel")
    assert (first.status_code, first.json()["status"]) == (200, "cancelled")
    assert second.json()["finished_at"] == first.json()["finished_at"]
    assert first.json()["finished_at"] is not None
    assert events_of(alice, job) == ["queued", "cancelled"]


def test_a_waiting_job_is_paused_at_once_and_resumed(alice: Caller) -> None:
    job = submit(alice)["id"]
    assert [alice.post(f"/jobs/{job}/pause").json()["status"] for _ in range(2)] == ["paused", "paused"]
    assert [alice.post(f"/jobs/{job}/resume").json()["status"] for _ in range(2)] == ["queued", "queued"]
    assert events_of(alice, job) == ["queued", "paused", "resumed"]


@pytest.mark.parametrize("status", ["preparing", "running"])
def test_pausing_a_resident_job_is_a_wish_that_can_be_taken_back(
    status: str, alice: Caller, services: Services
) -> None:
    job = submit(alice)["id"]
    change_job(services, job, status=status)
    for _ in range(2):
        answer = alice.post(f"/jobs/{job}/pause").json()
        assert (answer["status"], answer["requested"]) == (status, "pause")
    answer = alice.post(f"/jobs/{job}/resume").json()
    assert (answer["status"], answer["requested"]) == (status, None)
    assert events_of(alice, job) == ["queued", "pause_requested", "resumed"]


ACTIONS = {
    "cancel": dict.fromkeys(("queued", "preparing", "running", "paused", "cancelled"), "cancelled"),
    "pause": {"queued": "paused", "preparing": "preparing", "running": "running", "paused": "paused"},
    "resume": {"queued": "queued", "preparing": "preparing", "running": "running", "paused": "queued"},
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("status", list(TRANSITIONS))
def test_every_action_in_every_status_follows_the_table(
    action: str, status: JobStatus, alice: Caller, services: Services
) -> None:
    job = submit(alice)["id"]
    change_job(services, job, status=status)
    answer = alice.post(f"/jobs/{job}/{action}")
    after = ACTIONS[action].get(status)
    if after is None:
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "job_ended")
        assert alice.get(f"/jobs/{job}").json()["status"] == status
        return
    assert answer.json()["status"] == after
    assert after == status or JobStatus(after) in TRANSITIONS[status]


def test_only_an_ended_job_can_be_deleted_and_all_of_it_goes(alice: Caller, services: Services) -> None:
    job = submit(alice)["id"]
    add_metric(services, job, 1)
    adapter = add_adapter(services, job, 1)
    with services.database.read() as session:
        run = session.query(Run).one().id
    point = f"recovery/{run}/1-1"
    services.store.put(point, lambda folder: None)
    with services.database.write() as session:
        row = {"run_id": run, "epoch": 1, "step": 1, "cursor": {}, "cost_charged": 0, "key": point, "manifest": {}}
        recovery_points.publish(session, RecoveryPoint(id="rec_1", created_at=0.0, **row))
    refused = alice.delete(f"/jobs/{job}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "job_not_ended")
    alice.post(f"/jobs/{job}/cancel")
    assert alice.delete(f"/jobs/{job}").json() == {"id": job, "object": "job", "deleted": True}
    assert alice.get(f"/jobs/{job}").status_code == alice.get(f"/adapters/{adapter}").status_code == 404
    for folder in (f"jobs/{job}", f"adapters/{adapter}", point):
        assert not services.store.path(folder).exists()
    with services.database.read() as session:
        assert [session.query(table).count() for table in (Run, Event, Metric)] == [0, 0, 0]


def test_a_waiting_job_says_what_it_waits_for(
    alice: Caller, services: Services, publish_base: Callable[..., Base]
) -> None:
    job = submit(alice)["id"]

    def reason() -> str:
        queue = alice.get(f"/jobs/{job}").json()["queue"]
        assert queue["sentence"]
        return str(queue["reason"])

    assert reason() == "fair_share"
    with services.database.write() as session:
        drains.add_drain(
            session,
            mode="quick",
            deadline_seconds=None,
            reason="a new disk",
            daemon=None,
            exit_=False,
            created_by="admin",
        )
    assert reason() == "draining"
    assert "a new disk" in alice.get(f"/jobs/{job}").json()["queue"]["sentence"]
    assert submit(alice)["queue"]["reason"] == "draining"
    with services.database.write() as session:
        drains.end_drains(session)
    publish_base(hash="4567")
    assert reason() == "waiting_for_base"
    publish_base(live=False)
    assert reason() == "no_daemon"


def test_a_job_waits_for_a_daemon_that_loads_its_base(
    alice: Caller, admin: Caller, publish_base: Callable[..., Base]
) -> None:
    job = submit(alice)["id"]

    def reason() -> str:
        return str(alice.get(f"/jobs/{job}").json()["queue"]["reason"])

    publish_base(state="starting", published=False)
    assert reason() == "starting"
    admin.post("/admin/drain", json={"daemon": "one"})
    assert reason() == "draining"
    publish_base(beside=True, daemon="two")
    assert reason() == "fair_share"


def test_a_job_that_trains_or_has_ended_waits_for_nothing(alice: Caller, services: Services) -> None:
    job = submit(alice)["id"]
    for status in ("running", "paused", "succeeded"):
        change_job(services, job, status=status)
        assert alice.get(f"/jobs/{job}").json()["queue"]["reason"] is None


def test_estimates_follow_from_shares_and_speed(
    alice: Caller, bob: Caller, services: Services, publish_base: Callable[..., Base]
) -> None:
    publish_base(detail={"tokens_per_second": 100.0})
    job = submit(alice)
    alone = job["estimated_finish"] - job["queue"]["estimated_start"]
    assert alone == pytest.approx(job["progress"]["total_tokens"] / 100, rel=0.01)
    submit(bob)
    shared = alice.get(f"/jobs/{job['id']}").json()
    assert shared["queue"]["share"] == 0.5
    assert shared["estimated_finish"] - shared["queue"]["estimated_start"] == pytest.approx(2 * alone, rel=0.01)
    change_job(services, job["id"], status="paused")
    assert alice.get(f"/jobs/{job['id']}").json()["estimated_finish"] is None


def test_a_job_s_estimate_goes_by_the_daemons_of_its_base_that_are_not_drained(
    alice: Caller, admin: Caller, services: Services, publish_base: Callable[..., Base]
) -> None:
    """So do the places: with two of them the second job would begin at once."""
    detail = {"tokens_per_second": 10.0, "max_resident_runs": 1}
    publish_base(detail=detail)
    dataset = submit(alice)["dataset"]
    jobs = [job["id"] for job in alice.get("/jobs").json()["data"]] + [submit(alice, dataset)["id"]]
    for job in jobs:
        change_job(services, job, total_tokens=10**6)
    hold(services, jobs[0])

    def seconds() -> list[float]:
        """Until the second one starts, the first one ends, and the second one."""
        first, second = (alice.get(f"/jobs/{job}").json() for job in jobs)
        ends = (second["queue"]["estimated_start"], first["estimated_finish"], second["estimated_finish"])
        return [end - time.time() for end in ends]

    def speed() -> float:
        """That a new job is told of."""
        estimate = alice.post("/jobs/estimate", json={"dataset": dataset}).json()
        return float(estimate["tokens"] / estimate["seconds"])

    alone = pytest.approx([1e5, 1e5, 2e5], rel=0.01)
    assert (seconds(), speed()) == (alone, 10.0)
    fast = {"tokens_per_second": 990.0, "max_resident_runs": 16}
    publish_base(hash="4567", name="other", beside=True, daemon="two", detail=fast)
    assert (seconds(), speed()) == (alone, 990.0)
    publish_base(beside=True, daemon="three", detail=fast)
    assert seconds() == pytest.approx([0.0, 2000.0, 2000.0], abs=20)
    assert speed() == 1000.0
    admin.post("/admin/drain", json={"daemon": "three"})
    assert (seconds(), speed()) == (alone, 10.0)


def test_what_waits_for_another_base_stands_in_nobody_s_line(
    alice: Caller, bob: Caller, services: Services, publish_base: Callable[..., Base]
) -> None:
    publish_base(hash="4567", name="other")
    for caller in (alice, bob):
        change_job(services, submit(caller)["id"], total_tokens=10**7)
    publish_base(detail={"tokens_per_second": 10.0, "max_resident_runs": 1})
    job = submit(alice)
    change_job(services, job["id"], total_tokens=1000)
    found, waiting = alice.get("/jobs").json()["data"]
    assert (found["id"], found["queue"]["share"], waiting["queue"]["share"]) == (job["id"], 1.0, 0.5)
    assert found["estimated_finish"] - found["queue"]["estimated_start"] == pytest.approx(100.0)
    assert found["queue"]["estimated_start"] < time.time() + 1000


def hold(services: Services, job_id: str) -> None:
    """Let a job train in the newest daemon."""
    change_job(services, job_id, status="running")
    with services.database.write() as session:
        (newest,) = session.query(Daemon).order_by(Daemon.epoch.desc()).limit(1)
        session.query(Run).filter_by(job_id=job_id).one().lease_epoch = newest.epoch


def test_a_job_has_the_same_estimate_alone_and_in_a_list(
    alice: Caller, services: Services, publish_base: Callable[..., Base]
) -> None:
    """Though of a queue that is longer than there are places the end matters as well: it slows who rides longest."""
    publish_base(detail={"tokens_per_second": 100.0, "max_resident_runs": services.settings.max_resident_runs})
    first = submit(alice)
    jobs = [first, *(submit(alice, first["dataset"]) for _ in range(2 * services.settings.max_resident_runs - 1))]
    for left, job in enumerate(jobs):
        change_job(services, job["id"], tokens=job["progress"]["total_tokens"] - 10 * (left + 1))
    change_job(services, first["id"], status="running", tokens=0)

    def seconds(found: dict[str, Any]) -> float:
        return float(found["estimated_finish"] - found["queue"]["estimated_start"])

    listed = {job["id"]: seconds(job) for job in alice.get("/jobs?limit=100").json()["data"]}
    assert len(listed) == len(jobs)
    alone = {job["id"]: seconds(alice.get(f"/jobs/{job['id']}").json()) for job in jobs}
    assert alone == pytest.approx(listed)


def test_who_is_done_soon_leaves_the_speed_to_others_unless_its_queue_is_long(
    alice: Caller, bob: Caller, services: Services, publish_base: Callable[..., Base]
) -> None:
    publish_base(detail={"tokens_per_second": 100.0})
    job, others = submit(alice), [submit(bob) for _ in range(2)]
    tokens = job["progress"]["total_tokens"]
    for one in (job, others[0]):
        change_job(services, one["id"], status="running")

    def seconds() -> float:
        found = alice.get(f"/jobs/{job['id']}").json()
        return float(found["estimated_finish"] - found["queue"]["estimated_start"])

    change_job(services, others[0]["id"], tokens=tokens - 100)
    change_job(services, others[1]["id"], tokens=tokens - 40)
    assert seconds() == pytest.approx((tokens + 140) / 100)
    while len(others) < MOST_ADDED:
        others.append(submit(bob, others[0]["dataset"]))
        change_job(services, others[-1]["id"], tokens=tokens)
    assert seconds() == pytest.approx((tokens + 140) / 100)
    change_job(services, submit(bob, others[0]["dataset"])["id"], tokens=tokens)
    assert seconds() == pytest.approx(2 * tokens / 100)
