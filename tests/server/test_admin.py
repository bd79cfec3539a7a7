"""The operator's view: the queue of all tenants, daemons, drains, the base; and whether the service is ready."""

from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI

from server.api.services import Services
from server.db import drains
from server.db.tables import Base, Counter, Daemon, Drain, Run
from tests.server.conftest import Caller, new_tenant
from tests.server.making import change_job, submit


@pytest.mark.usefixtures("base")
def test_the_queue_shows_every_tenants_unfinished_jobs(
    admin: Caller, alice: Caller, bob: Caller, services: Services
) -> None:
    jobs = [submit(caller, priority="low")["id"] for caller in (alice, bob, alice)]
    change_job(services, jobs[0], status="running", step=3)
    change_job(services, jobs[2], status="failed")
    entries = admin.get("/admin/queue", params={"order": "asc"}).json()["data"]
    assert [(entry["id"], entry["tenant"]["name"]) for entry in entries] == [(jobs[0], "alice"), (jobs[1], "bob")]
    assert [(entry["status"], entry["reason"]) for entry in entries] == [("running", None), ("queued", "fair_share")]
    assert entries[0]["progress"]["step"] == 3
    assert (entries[1]["share"], entries[1]["tenant"]["counter"], entries[1]["priority"]) == (0.5, 0.0, "low")
    assert entries[1]["sentence"]


def test_a_tenant_s_counter_is_that_with_the_daemon_that_has_the_job_or_the_first_that_may(
    app: FastAPI, admin: Caller, publish_base: Callable[..., Base], services: Services
) -> None:
    publish_base(hash="another", seat=1)
    publish_base(seat=2, beside=True)
    publish_base(seat=3, beside=True)
    alice = new_tenant(app, admin, "alice")
    trains, waits = (submit(alice)["id"] for _ in range(2))
    change_job(services, trains, status="running")
    with services.database.write() as session:
        session.query(Run).filter_by(job_id=trains).one().seat = 3
        for one in session.query(Counter):
            one.counter = 10.0 * one.seat
    entries = {one["id"]: one["tenant"]["counter"] for one in admin.get("/admin/queue").json()["data"]}
    assert entries == {trains: 30.0, waits: 20.0}


def test_daemons_are_listed_by_their_epochs(admin: Caller, publish_base: Callable[..., Base]) -> None:
    publish_base(live=False)
    publish_base(detail={"gangs": 3})
    listed = admin.get("/admin/daemons").json()["data"]
    assert [(daemon["id"], daemon["live"], daemon["detail"]) for daemon in listed] == [
        ("2", True, {"gangs": 3}),
        ("1", False, {}),
    ]


def test_a_drain_is_a_row_that_holds_until_undrain(admin: Caller, services: Services) -> None:
    assert admin.get("/admin/drain").json() == {"object": "drain", "draining": False, "named": []}
    answer = admin.post("/admin/drain", json={"reason": "a new disk"})
    drain = answer.json()
    assert (answer.status_code, drain["mode"], drain["exit"], drain["deadline_at"]) == (201, "quick", False, None)
    assert admin.get("/admin/drain").json() == drain
    for _ in range(2):
        assert admin.post("/admin/undrain").json() == {"object": "drain", "draining": False, "named": []}
    assert admin.get("/admin/drain").json()["draining"] is False
    with services.database.read() as session:
        assert session.query(Drain).one().ended_at is not None


def test_a_second_drain_takes_the_place_of_the_first(admin: Caller, services: Services) -> None:
    admin.post("/admin/drain", json={"mode": "graceful", "deadline_seconds": 60.0})
    admin.post("/admin/drain", json={"mode": "fast", "exit": True})
    drain = admin.get("/admin/drain").json()
    assert (drain["mode"], drain["exit"]) == ("fast", True)
    with services.database.read() as session:
        assert session.query(Drain).filter(Drain.ended_at.is_(None)).count() == 1


def test_a_drain_is_at_rest_when_every_live_daemon_says_that_it_rests_under_it(
    admin: Caller, services: Services, publish_base: Callable[..., Base]
) -> None:
    def rest(epoch: int, drain: str) -> bool:
        with services.database.write() as session:
            session.get_one(Daemon, epoch).rests_under = drain
        return bool(admin.get("/admin/drain").json()["at_rest"])

    publish_base()
    publish_base(beside=True, daemon="two")
    publish_base(beside=True, live=False)
    first = admin.post("/admin/drain", json={}).json()
    assert first["at_rest"] is False
    assert [rest(epoch, first["id"]) for epoch in (1, 2)] == [False, True]
    second = admin.post("/admin/drain", json={"mode": "fast"}).json()
    assert second["at_rest"] is False
    of_one = admin.post("/admin/drain", json={"daemon": "two"}).json()
    assert [rest(*ack) for ack in ((1, second["id"]), (2, second["id"]), (2, of_one["id"]))] == [False, False, True]


def test_a_drain_of_one_daemon_leaves_the_others_at_work(
    admin: Caller, alice: Caller, publish_base: Callable[..., Base]
) -> None:
    def drained() -> list[str | None]:
        """Names of the live daemons that a drain is for, and what a job says that waits."""
        of = [one["name"] for one in admin.get("/admin/daemons").json()["data"] if one["drain"]]
        return [*of, alice.get(f"/jobs/{job}").json()["queue"]["reason"]]

    publish_base()
    publish_base(beside=True, daemon="two")
    job = submit(alice)["id"]
    answer = admin.post("/admin/drain", json={"daemon": "two", "reason": "a new disk"})
    assert (answer.status_code, answer.json()["daemon"]) == (201, "two")
    assert admin.get("/admin/drain").json()["draining"] is False
    assert admin.get("/admin/drain", params={"daemon": "two"}).json() == answer.json()
    assert drained() == ["two", "fair_share"]
    admin.post("/admin/drain", json={"daemon": "one", "reason": "a new fan"})
    assert drained() == ["two", "one", "draining"]
    assert "a new disk" in alice.get(f"/jobs/{job}").json()["queue"]["sentence"]
    assert admin.post("/admin/undrain", json={"daemon": "one"}).json()["draining"] is False
    assert drained() == ["two", "fair_share"]
    admin.post("/admin/drain", json={})
    assert drained() == ["two", "one", "draining"]
    assert admin.post("/admin/undrain", json={"daemon": "two"}).json()["daemon"] is None
    assert drained() == ["two", "one", "draining"]
    admin.post("/admin/undrain")
    assert drained() == ["fair_share"]


def test_a_drain_of_one_daemon_is_shown_when_that_has_ended_and_stands_beside_one_of_all(
    admin: Caller, services: Services, publish_base: Callable[..., Base]
) -> None:
    def named(answer: dict[str, Any]) -> list[tuple[str, str]]:
        return [(one["daemon"], one["reason"]) for one in answer["named"]]

    publish_base()
    publish_base(beside=True, daemon="two", live=False)
    admin.post("/admin/drain", json={"daemon": "two", "reason": "an old disk"})
    admin.post("/admin/drain", json={"daemon": "two", "reason": "a broken GPU", "exit": True})
    assert named(admin.get("/admin/drain").json()) == [("two", "a broken GPU")]
    assert admin.post("/admin/drain", json={"reason": "upgrade"}).json()["daemon"] is None
    with services.database.read() as session:
        assert drains.asks_to_end(session, "two")
        assert not drains.asks_to_end(session, "one")
    answer = admin.post("/admin/undrain").json()
    assert (answer["draining"], named(answer)) == (False, [("two", "a broken GPU")])
    assert named(admin.post("/admin/undrain", json={"daemon": "two"}).json()) == []


def test_training_waits_for_the_disk_where_every_daemon_of_the_base_does(
    alice: Caller, publish_base: Callable[..., Base]
) -> None:
    publish_base()
    job = submit(alice)["id"]
    publish_base(state="disk_full")
    assert alice.get(f"/jobs/{job}").json()["queue"]["reason"] == "disk"
    publish_base(beside=True)
    assert alice.get(f"/jobs/{job}").json()["queue"]["reason"] == "fair_share"
    assert alice.get("/readyz").status_code == 503, "the operator is to know"


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"mode": "slow"}, "invalid_request", "mode"),
        ({"daemon": "nobody"}, "unknown_daemon", "daemon"),
        ({"deadline_seconds": 5.0}, "deadline_needs_graceful", "deadline_seconds"),
        ({"mode": "graceful", "deadline_seconds": 0}, "invalid_request", "deadline_seconds"),
        ({"why": "so"}, "unknown_field", "why"),
    ],
)
def test_a_bad_drain_is_refused(body: dict[str, Any], code: str, param: str, admin: Caller) -> None:
    answer = admin.post("/admin/drain", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (422, code, param)
    assert admin.get("/admin/drain").json()["draining"] is False


def test_the_base_is_the_newest_daemons_and_its_path_the_operators_alone(
    admin: Caller, alice: Caller, publish_base: Callable[..., Base]
) -> None:
    assert alice.get("/base").json()["error"]["code"] == "base_not_ready"
    publish_base()
    publish_base(hash="4567", name="newer", context=100, live=False)
    base = alice.get("/base").json()
    assert (base["name"], base["hash"], base["max_row_tokens"]) == ("newer", "4567", 100)
    assert "path" not in base
    assert admin.get("/base").json() == {**base, "path": "/models/tiny"}


def test_of_several_daemons_one_that_lives_is_enough(
    admin: Caller, alice: Caller, publish_base: Callable[..., Base]
) -> None:
    publish_base(detail={"resident_runs": 2, "tokens_per_second": 10.0})
    publish_base(hash="4567", name="newer", beside=True, detail={"resident_runs": 3, "tokens_per_second": 5.0})
    publish_base(hash="89ab", name="dead", beside=True, live=False)
    assert [one["live"] for one in admin.get("/admin/daemons").json()["data"]] == [False, True, True]
    assert alice.get("/base").json()["name"] == "newer"
    assert admin.get("/readyz").status_code == 200
    figures = admin.get("/metrics").text
    for figure in ("mixloom_daemon_up 2.0", "mixloom_resident_runs 5.0", "mixloom_tokens_per_second 15.0"):
        assert figure in figures


def test_ready_means_a_base_and_a_live_daemon(anonymous: Caller, publish_base: Callable[..., Base]) -> None:
    assert anonymous.get("/healthz").json() == {"status": "alive"}
    answer = anonymous.get("/readyz")
    assert (answer.status_code, len(answer.json()["reasons"])) == (503, 2)
    publish_base()
    assert anonymous.get("/readyz").json() == {"status": "ready", "reasons": []}
    publish_base(live=False)
    answer = anonymous.get("/readyz")
    assert (answer.status_code, answer.json()["reasons"]) == (503, ["No engine daemon is running."])
