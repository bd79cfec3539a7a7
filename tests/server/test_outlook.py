"""When a job may start and end, from the queue at one moment."""

import itertools
from typing import Any

import pytest

from server.outlook import EndingTenant, Expectation, OpenDrain, Outlook, Queue, QueuedJob, Service
from server.states import Reason


def job(id_: str, tokens_left: int, status: str = "queued", weight: int = 4, *, short: bool = False) -> dict[str, Any]:
    """`short`: of memory."""
    return {"id": id_, "status": status, "weight": weight, "tokens_left": tokens_left, "waits_for_memory": short}


def in_line(*jobs: dict[str, Any]) -> list[QueuedJob]:
    """One behind the other."""
    until = itertools.accumulate(job["tokens_left"] for job in jobs)
    return [
        QueuedJob(**job, place=place, tokens_until=sum_)
        for place, (job, sum_) in enumerate(zip(jobs, until, strict=True), 1)
    ]


def outlook(*jobs: dict[str, Any], **changes: Any) -> Outlook:
    values: dict[str, Any] = {
        "now": 1000.0,
        "is_daemon_live": True,
        "services": {"0": Service()},
        "drain": None,
        "queues": {"0": queue_of(*jobs)},
    }
    return Outlook(**{**values, **changes})


def queue_of(*jobs: dict[str, Any], **changes: Any) -> Queue:
    values: dict[str, Any] = {
        "tokens_per_second": 10.0,
        "free_places": 0,
        "shares": {"ten": 1.0},
        "ending": [],
        "jobs": {"ten": in_line(*jobs)},
    }
    return Queue(**{**values, **changes})


def test_a_job_alone_takes_what_its_tokens_take() -> None:
    alone = outlook(job("a", 100, "running"))
    assert alone.expectation("ten", "a", "0", None) == Expectation(1000.0, 1010.0)


def test_resident_jobs_divide_the_speed_and_the_shorter_ends_first() -> None:
    two = outlook(job("a", 100, "running"), job("b", 300, "running"))
    assert two.expectation("ten", "a", "0", None).finish == 1020.0
    assert two.expectation("ten", "b", "0", None).finish == 1040.0


def test_priority_divides_it_unevenly() -> None:
    two = outlook(job("a", 100, "running", 16), job("b", 300, "running", 4))
    assert two.expectation("ten", "a", "0", None).finish == pytest.approx(1012.5)


def test_a_job_without_a_place_starts_when_those_before_it_are_done() -> None:
    queue = outlook(job("a", 100, "running"), job("b", 50), job("c", 30))
    assert queue.expectation("ten", "b", "0", Reason.FAIR_SHARE) == Expectation(1010.0, 1015.0)
    assert queue.expectation("ten", "c", "0", Reason.FAIR_SHARE) == Expectation(1015.0, 1018.0)


def test_the_next_job_takes_the_place_that_comes_free_first_and_slows_who_still_trains() -> None:
    queue = outlook(job("a", 100, "running"), job("b", 300, "running"), job("c", 50))
    assert queue.expectation("ten", "a", "0", None).finish == 1020.0
    assert queue.expectation("ten", "c", "0", Reason.FAIR_SHARE) == Expectation(1020.0, 1030.0)
    assert queue.expectation("ten", "b", "0", None).finish == 1045.0


def test_far_back_in_a_queue_that_is_not_read_whole_one_follows_the_other() -> None:
    last = QueuedJob(**job("z", 20), place=9, tokens_until=500)
    queue = outlook(queues={"0": queue_of(jobs={"ten": [*in_line(job("a", 100, "running"), job("b", 50)), last]})})
    assert queue.expectation("ten", "z", "0", Reason.FAIR_SHARE) == Expectation(1048.0, 1050.0)


def test_a_free_place_lets_it_start_now() -> None:
    queue = outlook(queues={"0": queue_of(job("a", 100, "running"), job("b", 50), free_places=1)})
    assert queue.expectation("ten", "b", "0", Reason.FAIR_SHARE) == Expectation(1000.0, 1010.0)


def test_a_free_place_is_of_no_use_without_memory() -> None:
    queue = outlook(
        queues={"0": queue_of(job("a", 100, "running"), job("b", 50, short=True), job("c", 20), free_places=5)}
    )
    assert queue.expectation("ten", "b", "0", Reason.MEMORY) == Expectation(1010.0, 1015.0)
    assert queue.expectation("ten", "c", "0", Reason.FAIR_SHARE) == Expectation(1015.0, 1017.0)
    assert queue.expectation("ten", "a", "0", None).finish == 1010.0


def test_a_share_slows_it_down() -> None:
    shared = outlook(queues={"0": queue_of(job("a", 100, "running"), shares={"ten": 0.25, "other": 0.75})})
    assert shared.expectation("ten", "a", "0", None).finish == 1040.0


@pytest.mark.parametrize(
    ("others_tokens", "finish"),
    [(100, 1040.0), (300, 1060.0), (900, 1060.0)],
    ids=["ends first", "ends with it", "ends later"],
)
def test_what_a_tenant_leaves_that_ends_is_the_others(others_tokens: float, finish: float) -> None:
    ending = [EndingTenant(0.5, others_tokens), EndingTenant(0.5, 300)]
    shared = outlook(queues={"0": queue_of(job("a", 300, "running"), shares={"ten": 0.5}, ending=ending)})
    assert shared.expectation("ten", "a", "0", None).finish == finish


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"tokens_per_second": None}, None), ({}, Reason.DRAINING), ({}, Reason.NO_DAEMON), ({"jobs": {}}, None)],
)
def test_where_nothing_can_be_said_nothing_is(changes: dict[str, Any], reason: Reason | None) -> None:
    assert (
        outlook(queues={"0": queue_of(job("a", 100), **changes)}).expectation("ten", "a", "0", reason) == Expectation()
    )


@pytest.mark.parametrize(
    ("status", "base_hash", "changes", "reason"),
    [
        ("queued", "0", {}, Reason.FAIR_SHARE),
        ("queued", "1", {}, Reason.WAITING_FOR_BASE),
        ("queued", "1", {"drain": OpenDrain(reason="")}, Reason.DRAINING),
        ("queued", "0", {"is_daemon_live": False, "drain": OpenDrain(reason="")}, Reason.NO_DAEMON),
        ("running", "0", {"is_daemon_live": False}, Reason.NO_DAEMON),
        ("running", "0", {"drain": OpenDrain(reason="")}, None),
        ("queued", "0", {"services": {"0": Service(drain=OpenDrain(reason=""))}}, Reason.DRAINING),
        ("queued", "0", {"services": {"0": Service(is_disk_full=True)}}, Reason.DISK),
        ("running", "0", {"services": {"0": Service(is_disk_full=True)}}, Reason.DISK),
        ("queued", "1", {"services": {"0": Service(is_disk_full=True), "1": Service()}}, Reason.FAIR_SHARE),
        ("queued", "0", {"services": {"0": Service(is_trying=True)}}, Reason.TRIAL),
        ("running", "0", {"services": {"0": Service(is_trying=True)}}, None),
        ("queued", "0", {"services": {"0": Service(is_starting=True, is_trying=True)}}, Reason.STARTING),
        ("queued", "1", {"services": {"0": Service(is_starting=True)}}, Reason.WAITING_FOR_BASE),
        ("paused", "0", {"is_daemon_live": False}, None),
        ("failed", "0", {"is_daemon_live": False}, None),
    ],
)
def test_a_job_waits_for_the_first_thing_that_is_missing(
    status: str, base_hash: str, changes: dict[str, Any], reason: Reason | None
) -> None:
    assert outlook(**changes).reason(status, base_hash) == reason


def test_a_reason_that_the_daemon_noted_is_shown() -> None:
    assert outlook().reason("queued", "0", "memory") is Reason.MEMORY
