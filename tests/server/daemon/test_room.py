"""Runs come into memory as far as their bytes fit, and passes are as large as the rest allows."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from engine import recovery
from engine.base_model import BaseModel
from server.api.services import Services
from server.daemon.publish import base_row
from server.daemon.snapshot import MOST_TOKENS, take_snapshot
from server.db import daemons
from server.db.tables import Base, Daemon, Job
from server.memory import recovery_bytes, resident_bytes, token_bytes
from server.resolve import num_parameters
from tests.server.conftest import Caller
from tests.server.daemon.conftest import MIXTURE, PLAIN, Life, final_hash, job, memory_of, submit
from tests.server.daemon.test_wishes import drain

LEAST = 320  # tokens of the pass that must be possible: `fill_min`


@pytest.fixture
def base(frozen: BaseModel) -> Base:
    return base_row(frozen, source=Path(), tokenizer={}, probed={}, memory=memory_of(frozen))


@pytest.fixture
def with_room(new_life: Callable[..., Life], services: Services, base: Base) -> Callable[..., Life]:
    """A life with memory for so many runs of a job's adapter, and a pass of so many tokens."""

    def begin(job_id: str, *, runs: int, tokens: int = LEAST, **changes: Any) -> Life:
        adapter = job(services, job_id).adapter
        copy = recovery_bytes(adapter, base)
        room = runs * resident_bytes(adapter, base) + copy + tokens * token_bytes(adapter, base)
        return new_life(room=room, **{"token_budget": "auto", "microbatch_tokens": 256, **changes})

    return begin


def queue(caller: Caller, job_id: str) -> dict[str, Any]:
    return dict(caller.get(f"/jobs/{job_id}").json()["queue"])


def test_whoever_comes_in_a_microbatch_fits_beside_it_though_gangs_are_to_be_smaller(
    life: Life, with_room: Callable[..., Life], alice: Caller, services: Services
) -> None:
    first, second = (submit(alice, MIXTURE) for _ in range(2))
    life = with_room(first, runs=1, tokens=1024, token_budget=256, microbatch_tokens=1024)
    life.turn(2)
    assert [one.job.id for one in life.loop.residents] == [first]
    assert queue(alice, second)["reason"] == "memory"
    life.finish()
    assert {job(services, id_).status for id_ in (first, second)} == {"succeeded"}


def test_a_run_that_does_not_fit_beside_the_others_waits_for_memory(
    life: Life, with_room: Callable[..., Life], alice: Caller, services: Services
) -> None:
    first, second = (submit(alice, MIXTURE) for _ in range(2))
    life = with_room(first, runs=1)
    life.turn(2)
    assert [one.job.id for one in life.loop.residents] == [first]
    assert queue(alice, second)["reason"] == "memory"
    assert "memory" in queue(alice, second)["sentence"]
    with services.database.write() as session:
        daemons.update_daemon(session, life.books.epoch, detail={"tokens_per_second": 1.0})
    ends = alice.get(f"/jobs/{first}").json()["estimated_finish"]
    assert ends > time.time() + 100
    assert queue(alice, second)["estimated_start"] == pytest.approx(ends, abs=60), "not now, though places are free"
    life.finish()
    assert final_hash(services, first) == final_hash(services, second)
    assert queue(alice, second)["reason"] is None


@pytest.mark.databases("postgresql")
def test_of_two_daemons_that_are_short_of_memory_the_one_that_is_drained_does_not_speak_for_the_other(
    life: Life, with_room: Callable[..., Life], alice: Caller, services: Services
) -> None:
    jobs = [submit(alice, MIXTURE, steps=200) for _ in range(3)]
    life.books.end()
    first, second = (with_room(jobs[0], runs=1, supervisor=name, name=name) for name in ("one", "two"))

    def turn() -> list[str]:
        """Why those wait that do, after both have looked twice."""
        for _ in range(2):
            first.turn()
            second.turn()
        return [queue(alice, one)["reason"] for one in jobs if job(services, one).status == "queued"]

    turn()
    assert turn() == ["memory"]
    drain(services, daemon="two", mode="graceful")
    assert turn() == ["memory"]


@pytest.mark.parametrize(("dora", "copies"), [(False, 3), (True, 0)])
def test_on_a_gpu_a_pass_has_the_copies_of_those_that_share_its_launches(
    life: Life, alice: Caller, services: Services, base: Base, dora: bool, copies: int
) -> None:
    """In float32 three of a parameter: two of the weight, one of its gradient."""
    adapter = job(services, submit(alice, {**MIXTURE, "dora": dora})).adapter
    base.fingerprint = {**base.fingerprint, "threads": 1}  # experts are one block, as on a GPU
    on_cpu = token_bytes(adapter, base)
    base.fingerprint = {**base.fingerprint, "device": "cuda"}
    more = (token_bytes(adapter, base) - on_cpu) * base.microbatch_tokens
    assert more == pytest.approx(copies * 4 * num_parameters(adapter, base), abs=base.microbatch_tokens)


def test_with_memory_for_both_neither_waits(life: Life, with_room: Callable[..., Life], alice: Caller) -> None:
    first, second = (submit(alice, MIXTURE) for _ in range(2))
    life = with_room(first, runs=2)
    life.turn(2)
    assert {one.job.id for one in life.loop.residents} == {first, second}


def test_a_job_that_would_never_fit_fails_with_the_bytes_and_the_next_one_trains(
    life: Life, with_room: Callable[..., Life], alice: Caller, services: Services, base: Base
) -> None:
    large, small = submit(alice, {**MIXTURE, "rank": 16}), submit(alice, PLAIN)
    life = with_room(small, runs=1)
    life.finish()
    error = job(services, large).error
    assert error is not None
    assert error["code"] == "out_of_memory"
    assert f"{resident_bytes(job(services, large).adapter, base)} for its adapter" in error["message"]
    assert final_hash(services, small)


def test_a_job_that_was_in_memory_once_waits_for_a_machine_with_as_much_again(
    life: Life, with_room: Callable[..., Life], alice: Caller, bob: Caller, services: Services
) -> None:
    large, small = submit(alice, {**MIXTURE, "rank": 16}), submit(bob, PLAIN)
    life = with_room(large, runs=1)
    life.turn_until(lambda: job(services, large).step == 5)
    life = with_room(small, runs=1)
    life.turn_until(lambda: job(services, small).status == "succeeded")
    assert job(services, large).status == "queued"
    assert queue(alice, large)["reason"] == "memory"
    life = with_room(large, runs=1)
    life.finish()
    assert final_hash(services, large)


def test_a_job_that_waits_for_another_machine_holds_up_no_others_of_its_tenant(
    life: Life, with_room: Callable[..., Life], alice: Caller, services: Services
) -> None:
    large = submit(alice, {**MIXTURE, "rank": 16}, priority="high")
    life = with_room(large, runs=1)
    life.turn_until(lambda: job(services, large).step == 5)
    small = [submit(alice, PLAIN, steps=2) for _ in range(2)]
    life = with_room(small[0], runs=1)
    life.turn_until(lambda: all(job(services, id_).status == "succeeded" for id_ in small))
    life.turn()
    assert (job(services, large).status, queue(alice, large)["reason"]) == ("queued", "memory")
    life = with_room(large, runs=1)
    life.finish()
    assert final_hash(services, large)


def test_a_job_that_fits_into_an_empty_machine_waits_for_one_with_a_longer_pass(
    life: Life, with_room: Callable[..., Life], alice: Caller, bob: Caller, services: Services
) -> None:
    """As one that was submitted when `microbatch_tokens` was larger."""
    small, large = submit(bob, PLAIN, rows=24, batch=24), submit(alice, {**MIXTURE, "rank": 16})
    with services.database.write() as session:
        one = session.get_one(Job, small)
        one.training = {**one.training, "microbatch_tokens": 1000}
    life = with_room(large, runs=1)
    life.turn()
    assert max(work.num_tokens for work in life.resident(small).program.offered()) > LEAST
    assert (job(services, large).status, queue(alice, large)["reason"]) == ("queued", "memory")
    life.finish()
    assert final_hash(services, small)
    assert final_hash(services, large)


@pytest.mark.databases("postgresql")
@pytest.mark.parametrize("other", ["serves it", "loads a base", "has died"])
def test_a_job_that_another_daemon_has_or_may_have_room_for_waits(
    other: str,
    life: Life,
    new_life: Callable[..., Life],
    with_room: Callable[..., Life],
    alice: Caller,
    bob: Caller,
    services: Services,
) -> None:
    large, small = submit(alice, {**MIXTURE, "rank": 16}), submit(bob, PLAIN)
    behind = submit(alice, PLAIN, steps=2)
    life.books.end()
    second = new_life(name="two", supervisor="another")
    with services.database.write() as session:
        values = {"loads a base": {"base_hash": None}, "has died": {"expires_at": time.time() - 60}}.get(
            other, {"state": "ready"}
        )
        session.execute(update(Daemon).where(Daemon.epoch == second.books.epoch).values(**values))
    life = with_room(small, runs=1)
    life.turn_until(lambda: all(job(services, id_).status == "succeeded" for id_ in (small, behind)))
    assert (job(services, large).status, queue(alice, large)["reason"]) == ("queued", "memory")
    with services.database.write() as session:
        session.execute(update(Daemon).where(Daemon.epoch == second.books.epoch).values(ended_at=1.0, expires_at=1.0))
    life.turn()
    assert job(services, large).status == "failed"


def test_a_gang_has_as_many_tokens_as_memory_leaves_for_it(
    life: Life, with_room: Callable[..., Life], alice: Caller
) -> None:
    job_id = submit(alice, MIXTURE)
    for tokens, budget in ((LEAST, LEAST), (700, 700), (10 * MOST_TOKENS, MOST_TOKENS)):
        life = with_room(job_id, runs=1, tokens=tokens)
        life.turn()
        snapshot = take_snapshot(
            life.books,
            life.loop.residents,
            life.settings,
            base_hash=life.loop.engine.base.hash,
            fill_min=LEAST,
            floor=0.0,
            draining=False,
            sampled={},
            room=life.loop.room,
        )
        assert snapshot.token_budget == budget


def test_a_run_and_its_recovery_point_have_the_bytes_that_were_said(
    life: Life, alice: Caller, base: Base, tmp_path: Path
) -> None:
    submit(alice, MIXTURE)
    life.turn(2)
    (resident,) = life.loop.residents
    assert resident.run.bytes == resident_bytes(resident.job.adapter, base)
    recovery.write(recovery.capture(resident.run), tmp_path)
    written = (tmp_path / "state.safetensors").stat().st_size
    assert 0 <= written - recovery_bytes(resident.job.adapter, base) < 1024
