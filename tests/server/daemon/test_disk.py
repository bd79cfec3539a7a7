"""A disk that is full, or fails: training waits for it, and what was written half is written again."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from server import doctor
from server.api.services import Services
from server.db.tables import Run
from server.faults import Fault, arm
from tests.server.conftest import Caller
from tests.server.daemon.conftest import MIXTURE, PLAIN, Life, events, final_hash, job, points, steps, submit
from tests.server.daemon.test_wishes import drain, is_at_rest, undrain
from tests.server.making import prompt_rows, upload

PUTS = ("put.written", "put.synced", "put.renamed", "put.published")
WITHOUT_END = 10**6
WAIT_SECONDS = 60
"""A writer has its own thread, and a busy machine little time for it."""


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.daemon.writer.RETRY_SECONDS", 0.01)


@pytest.mark.parametrize("kind", ["EIO", "ENOSPC"])
def test_a_disk_that_fails_at_any_point_of_a_write_costs_time_and_no_bit(
    kind: str, undisturbed: str, life: Life, alice: Caller, services: Services, armed: Path
) -> None:
    places = ("recovery", "adapters")
    arm(armed, *(Fault(point=point, kind=kind, about=place) for place in places for point in PUTS))
    id_ = submit(alice, MIXTURE)
    life.finish()
    assert '"times": 1' not in armed.read_text(), "all have struck"
    assert final_hash(services, id_) == undisturbed
    assert steps(services, id_) == list(range(1, 13))
    assert events(services, id_).count("write_failed") == 2, "once for each file, however often it failed"
    assert doctor.examine(services.database, services.store) == []
    assert not list(services.store.root.rglob("*.tmp"))


def test_while_the_disk_takes_nothing_training_waits_and_then_goes_on_by_itself(
    undisturbed: str, life: Life, alice: Caller, services: Services, armed: Path
) -> None:
    id_ = submit(alice, MIXTURE)
    life.turn_until(lambda: job(services, id_).step == 4)
    arm(armed, Fault(point="put.synced", kind="ENOSPC", about="recovery", times=WITHOUT_END))
    life.loop.turn()  # step 5, with its recovery point
    turn_until(life, lambda: life.loop.waits_for_disk)
    stands = job(services, id_).step
    for _ in range(5):
        life.loop.turn()
    assert (job(services, id_).status, job(services, id_).step) == ("running", stands)
    queue = alice.get(f"/jobs/{id_}").json()["queue"]
    assert (queue["reason"], "disk is full" in queue["sentence"]) == ("disk", True)
    arm(armed)
    turn_until(life, lambda: not life.loop.waits_for_disk)
    assert alice.get(f"/jobs/{id_}").json()["queue"]["reason"] is None
    life.finish()
    assert final_hash(services, id_) == undisturbed
    kinds = sorted(kind for kind in events(services, id_) if "disk" in kind or "write" in kind)
    assert kinds == ["disk_full", "disk_has_room", "write_failed"]


def turn_until(life: Life, condition: Callable[[], bool]) -> None:
    """As `life.turn_until`, without waiting for writes: they may not end."""
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end, f"not within {WAIT_SECONDS} seconds"
        life.loop.turn()


def test_below_the_least_room_uploads_are_refused_and_all_else_waits_or_works(
    undisturbed: str, life: Life, alice: Caller, anonymous: Caller, services: Services
) -> None:
    id_, spare = submit(alice, MIXTURE), upload(alice, prompt_rows(3))
    life.turn_until(lambda: job(services, id_).step == 7)
    enough = services.disk.min_free_bytes
    services.disk.min_free_bytes = life.loop.disk.min_free_bytes = 2**62
    life.turn(3)
    assert job(services, id_).step == 7
    for answer in (
        alice.post("/datasets", files={"file": ("rows.jsonl", '{"text": "a"}')}),
        alice.post("/adapters", files={"config": b"{}", "weights": b""}),
        alice.post("/jobs", json={"dataset": spare, "adapter": PLAIN}),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (507, "disk_full")
        assert "MiB are free" in answer.json()["error"]["message"]
    assert anonymous.get("/readyz").json()["reasons"] == ["The disk is full; jobs wait until it has room."]
    assert alice.get("/datasets").status_code == 200
    assert alice.delete(f"/datasets/{spare}").status_code == 200
    assert alice.post(f"/jobs/{id_}/pause").status_code == 200
    life.turn(2)
    assert job(services, id_).status == "paused", "what is begun is written into the room that is kept for it"
    alice.post(f"/jobs/{id_}/resume")
    services.disk.min_free_bytes = life.loop.disk.min_free_bytes = enough
    life.finish()
    assert final_hash(services, id_) == undisturbed
    assert steps(services, id_) == list(range(1, 13))


def test_what_the_api_finds_no_room_for_is_refused_and_leaves_nothing(
    life: Life, alice: Caller, services: Services, armed: Path
) -> None:
    data = upload(alice, prompt_rows(5))
    for point in PUTS:
        for noun, send in (
            ("datasets", lambda: alice.post("/datasets", files={"file": ("rows.jsonl", '{"text": "a"}')})),
            ("jobs", lambda: alice.post("/jobs", json={"dataset": data, "adapter": PLAIN})),
        ):
            arm(armed, Fault(point=point, kind="ENOSPC", about=noun))
            answer = send()
            assert (answer.status_code, answer.json()["error"]["code"]) == (507, "disk_full")
            assert int(answer.headers["Retry-After"]) > 0
    assert [one["id"] for one in alice.get("/datasets").json()["data"]] == [data]
    assert services.store.list("datasets") == [f"datasets/{data}"]
    assert alice.get("/jobs").json()["data"] == services.store.list("jobs") == []
    assert not list(services.store.root.rglob("*.tmp"))


def cost_of(services: Services, job_id: str) -> int:
    with services.database.read() as session:
        return session.query(Run).filter_by(job_id=job_id).one().cost_charged


def begin_in_mid_step(new_life: Callable[..., Life], alice: Caller, services: Services) -> tuple[Life, str]:
    """A job that has done a part of its third step when the disk is nearly full; only a drain or an end saves it."""
    life = new_life(token_budget=256, recovery_steps=1000)
    id_ = submit(alice, MIXTURE, rows=24, batch=20, steps=3)
    life.turn_until(lambda: job(services, id_).step == 2 and not life.resident(id_).program.at_boundary)
    life.loop.disk.min_free_bytes = 2**62
    life.turn()
    assert life.loop.waits_for_disk
    return life, id_


@pytest.mark.parametrize("why", ["pause", "quick", "SIGTERM", "deadline"])
def test_in_mid_step_too_a_run_that_is_to_leave_leaves_while_the_disk_is_nearly_full(
    why: str, new_life: Callable[..., Life], alice: Caller, services: Services
) -> None:
    life, id_ = begin_in_mid_step(new_life, alice, services)
    match why:
        case "pause":
            alice.post(f"/jobs/{id_}/pause")
        case "SIGTERM":
            life.loop.stopping.set()
        case _:
            drain(services, mode="quick" if why == "quick" else "graceful", deadline_seconds=0)
    life.turn(2)
    assert life.loop.residents == []
    assert job(services, id_).status == ("paused" if why == "pause" else "queued")
    assert [point.step for point in points(services, id_)] == [2]
    undrain(services)
    alice.post(f"/jobs/{id_}/resume")
    life = new_life()
    life.finish()
    again = submit(alice, MIXTURE, rows=24, batch=20, steps=3)
    life.finish()
    assert final_hash(services, id_) == final_hash(services, again)
    assert cost_of(services, id_) == cost_of(services, again), "a part of a step that is done twice is paid once"


@pytest.mark.parametrize("first_try", [False, True])
def test_a_fast_drain_gives_up_what_the_disk_does_not_take(
    first_try: bool, undisturbed: str, life: Life, alice: Caller, services: Services, armed: Path
) -> None:
    """The recovery point of one job, and the final adapter of another that waits behind it."""
    short, long = submit(alice, PLAIN, steps=5), submit(alice, MIXTURE)
    life.turn_until(lambda: job(services, long).step == 4)
    arm(armed, Fault(point="put.synced", kind="ENOSPC", times=WITHOUT_END))
    turn_until(life, lambda: not life.writer.is_idle if first_try else life.loop.waits_for_disk)
    drain(services, mode="fast")
    life.loop.turn()
    assert life.loop.residents == []
    assert [job(services, id_).status for id_ in (short, long)] == ["queued"] * 2
    assert alice.get(f"/jobs/{long}/events").json()["data"][0]["message"] == "The job is waiting, saved at step 0."
    assert not list((services.store.root / "recovery").rglob("*.tmp"))
    arm(armed)
    life.turn()
    assert is_at_rest(services)
    undrain(services)
    life.finish()
    assert final_hash(services, long) == undisturbed
    assert steps(services, short) == list(range(1, 6))
    assert doctor.examine(services.database, services.store) == []
