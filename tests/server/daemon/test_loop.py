"""Jobs side by side: what one may do to another (nothing), and what each is left with."""

from collections.abc import Callable

import pytest
from fastapi import FastAPI

from server.api.services import Services
from server.db.tables import Counter, Job, Metric, Run
from tests.server.conftest import Caller, new_tenant
from tests.server.daemon.conftest import (
    MIXTURE,
    PLAIN,
    Life,
    adapters,
    break_rows,
    events,
    final_hash,
    job,
    jobs,
    steps,
    submit,
)
from tests.server.making import prompt_rows, upload


@pytest.fixture(scope="module")
def alone() -> dict[str, str]:
    """Hashes of the two jobs that the tests compare with, each trained alone; filled by the first who asks."""
    return {}


@pytest.fixture
def hashes(alone: dict[str, str], new_life: Callable[..., Life], alice: Caller, services: Services) -> dict[str, str]:
    """`{"mixture", "plain"}`: what those jobs come to when nobody else is there."""
    if not alone:
        life = new_life()
        for name, adapter in (("mixture", MIXTURE), ("plain", PLAIN)):
            id_ = submit(alice, adapter)
            life.finish()
            alone[name] = final_hash(services, id_)
            alice.delete(f"/jobs/{id_}")
    return alone


def test_a_job_comes_out_the_same_in_any_company_and_with_any_budget(
    hashes: dict[str, str], new_life: Callable[..., Life], alice: Caller, bob: Caller, services: Services
) -> None:
    life = new_life(token_budget=512)
    wide = submit(bob, {**MIXTURE, "rank": 8, "num_experts": 2, "top_k": 1}, steps=20, batch=6)
    mixture, plain = submit(alice, MIXTURE), submit(bob, PLAIN)
    life.finish()
    assert final_hash(services, mixture) == hashes["mixture"]
    assert final_hash(services, plain) == hashes["plain"]
    assert steps(services, wide) == list(range(1, 21))


def test_a_job_whose_numbers_break_ends_alone(
    hashes: dict[str, str], life: Life, alice: Caller, bob: Caller, services: Services
) -> None:
    mixture, broken, plain = submit(alice, MIXTURE), submit(bob, MIXTURE), submit(bob, PLAIN)
    life.turn_until(lambda: len(life.roster.residents) == 3 and life.step_of(broken) == 3)
    life.resident(broken).run.adapter.flat[7] = float("nan")
    life.finish()
    assert job(services, broken).status == "failed"
    assert job(services, broken).error["code"] == "diverged"
    assert "learning rate" in job(services, broken).error["message"]
    assert steps(services, broken) == [1, 2, 3]
    assert final_hash(services, mixture) == hashes["mixture"]
    assert final_hash(services, plain) == hashes["plain"]


def test_a_learning_rate_without_sense_ends_its_job_or_lets_it_end_and_disturbs_nobody(
    hashes: dict[str, str], life: Life, alice: Caller, bob: Caller, services: Services
) -> None:
    wild = submit(
        bob,
        {**PLAIN, "alpha": 1e6},
        training={"learning_rate": 10, "warmup_ratio": 0, "max_grad_norm": 1e9, "schedule": "constant"},
    )
    mixture = submit(alice, MIXTURE)
    life.finish()
    assert job(services, wild).status in ("failed", "succeeded")
    assert final_hash(services, mixture) == hashes["mixture"]


def test_a_job_whose_rows_are_gone_cannot_start_and_the_others_do(
    hashes: dict[str, str], life: Life, alice: Caller, bob: Caller, services: Services
) -> None:
    gone, torn, mixture = submit(alice, PLAIN), submit(bob, PLAIN), submit(bob, MIXTURE)
    services.store.delete(f"jobs/{gone}")
    (services.store.path(f"jobs/{torn}") / "train.safetensors").write_bytes(b"not a tensor file")
    life.finish()
    for id_ in (gone, torn):
        error = job(services, id_).error
        assert (job(services, id_).status, error["code"]) == ("failed", "cannot_start")
        assert str(services.store.root) not in error["message"]
    assert final_hash(services, mixture) == hashes["mixture"]


def test_a_job_whose_rows_break_the_pass_ends_alone(
    hashes: dict[str, str], life: Life, alice: Caller, bob: Caller, services: Services
) -> None:
    broken, mixture, plain = submit(bob, PLAIN), submit(alice, MIXTURE), submit(bob, PLAIN)
    break_rows(services, broken, 6)
    life.finish()
    assert job(services, broken).status == "failed"
    assert job(services, broken).error["code"] == "pass_failed"
    assert final_hash(services, mixture) == hashes["mixture"]
    assert final_hash(services, plain) == hashes["plain"]


def test_who_breaks_the_pass_is_found_also_when_it_rides_only_in_every_other_gang(
    new_life: Callable[..., Life], app: FastAPI, admin: Caller, services: Services
) -> None:
    life = new_life(token_budget=500)
    callers = sorted((new_tenant(app, admin, f"tenant-{n}") for n in range(4)), key=lambda one: one.tenant_id)
    ids = [submit(caller, PLAIN, steps=6) for caller in callers]  # of equal V: two and two ride in turns
    break_rows(services, ids[0], *range(12))
    life.turn(4)
    assert job(services, ids[0]).status == "failed"
    life.finish()
    assert [job(services, id_).status for id_ in ids[1:]] == ["succeeded"] * 3


def test_a_finished_job_has_its_adapter_while_the_others_still_train(
    life: Life, alice: Caller, bob: Caller, services: Services
) -> None:
    long, short = submit(alice, PLAIN, steps=30), submit(bob, PLAIN, steps=2)
    life.turn_until(lambda: job(services, short).status == "succeeded")
    assert job(services, long).status == "running"
    assert bob.get(f"/jobs/{short}/adapter").content[:2] == b"PK"


def test_a_new_job_rides_in_the_next_gang(life: Life, alice: Caller, bob: Caller, services: Services) -> None:
    long = submit(alice, MIXTURE, steps=40)
    life.turn_until(lambda: life.loop.recorder.num_gangs == 5)
    late = submit(bob, MIXTURE)
    life.turn(2)
    assert job(services, late).step == 2
    with services.database.read() as session:
        first = session.get_one(Metric, (late, 1))
    assert (first.gang, first.gang_jobs) == (6, 2)
    assert job(services, long).step == 7


def test_the_newest_checkpoints_and_the_best_one_are_kept(life: Life, alice: Caller, services: Services) -> None:
    training = {"checkpoint_every": 2, "evaluate_every": 2, "keep_checkpoints": 2}
    backwards = [{**row, "completion": row["completion"][::-1]} for row in prompt_rows(4)]
    other = upload(alice, backwards)  # the better the rows are learned, the worse it is at these
    id_ = submit(alice, PLAIN, steps=16, rows=16, validation=other, training=training)
    seen: dict[int, float] = {}

    def look() -> bool:
        seen.update({one.step: one.valid_loss for one in adapters(services, id_)})
        return job(services, id_).status == "succeeded"

    life.turn_until(look)
    kept = adapters(services, id_)
    best = min(seen, key=lambda step: (seen[step], step))
    assert {one.step for one in kept} == {16, 14, best}
    assert best < 14, seen
    folders = {f"adapters/{path.name}" for path in services.store.path("adapters").iterdir()}
    assert folders == {one.key for one in kept}
    assert sorted(seen) == list(range(2, 17, 2))
    with services.database.read() as session:
        measured = session.query(Metric.step).filter(Metric.job_id == id_, Metric.valid_loss.is_not(None))
        assert [row.step for row in measured] == list(range(2, 17, 2))


def test_of_a_tenants_jobs_the_urgent_ones_come_into_memory_first(
    new_life: Callable[..., Life], alice: Caller, services: Services
) -> None:
    life = new_life(max_resident_runs=1)
    data = upload(alice, prompt_rows(12))
    ids = {
        priority: submit(alice, PLAIN, steps=3, dataset=data, priority=priority)
        for priority in ("low", "normal", "high")
    }
    life.finish()
    started = {priority: job(services, id_).started_at for priority, id_ in ids.items()}
    assert started["high"] < started["normal"] < started["low"]


def test_a_run_gives_its_place_to_a_tenant_without_one_and_loses_nothing(
    hashes: dict[str, str], new_life: Callable[..., Life], alice: Caller, bob: Caller, services: Services
) -> None:
    life = new_life(max_resident_runs=2, recovery_steps=0, stay_tokens=1)
    mixture, plain = submit(alice, MIXTURE), submit(alice, PLAIN)
    life.turn_until(lambda: len(life.roster.residents) == 2 and life.step_of(plain) == 3)
    late = submit(bob, PLAIN, steps=4)
    life.turn_until(lambda: job(services, late).status == "running")
    assert {one.job.id for one in life.loop.residents} == {mixture, late}
    assert job(services, plain).status == "queued"
    assert events(services, plain)[-1] == "waiting"
    life.finish()
    assert final_hash(services, mixture) == hashes["mixture"]
    assert final_hash(services, plain) == hashes["plain"]
    assert steps(services, plain) == list(range(1, 13))


def test_a_wish_to_pause_outlives_an_eviction(
    new_life: Callable[..., Life], alice: Caller, bob: Caller, services: Services
) -> None:
    life = new_life(max_resident_runs=2, recovery_steps=0, stay_tokens=1)
    kept, evicted = submit(alice, PLAIN, steps=30), submit(alice, PLAIN, steps=30)
    life.turn_until(lambda: len(life.roster.residents) == 2 and life.step_of(evicted) == 3)
    submit(bob, PLAIN, steps=4)
    life.turn()
    resident = life.resident(evicted)
    life.roster.leave(resident)  # its recovery point is being written
    assert alice.post(f"/jobs/{evicted}/pause").json()["requested"] == "pause"
    life.turn()
    assert (job(services, evicted).status, job(services, evicted).requested) == ("paused", None)
    assert job(services, kept).status == "running"


def test_what_is_charged_is_what_the_metrics_show_of_it(
    life: Life, alice: Caller, bob: Caller, services: Services
) -> None:
    data = {caller: upload(caller, prompt_rows(12)) for caller in (alice, bob)}
    for caller in (alice, bob):
        submit(caller, MIXTURE, steps=10, dataset=data[caller])
    life.finish()
    with services.database.read() as session:
        by_tenant = {one.tenant_id: one.counter for one in session.query(Counter)}
        costs = {run.tenant_id: run.cost_charged for run in session.query(Run)}
        tokens = {one.tenant_id: one.tokens for one in session.query(Job)}
    assert by_tenant[alice.tenant_id] == by_tenant[bob.tenant_id] == costs[alice.tenant_id]
    assert costs[alice.tenant_id] > tokens[alice.tenant_id] > 0


def test_nothing_rests_in_memory_when_everything_has_ended(life: Life, alice: Caller, services: Services) -> None:
    submit(alice, MIXTURE)
    submit(alice, PLAIN)
    life.finish()
    assert not life.roster.residents
    assert life.writer.is_idle
    assert not list(services.store.path("recovery").glob("*/*"))
    assert [one.status for one in jobs(services)] == ["succeeded"] * 2
