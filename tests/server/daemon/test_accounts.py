"""The accounts that the scheduler reads and adds to, in the real database."""

from collections.abc import Callable

import pytest
from fastapi import FastAPI

from server.api.services import Services
from server.daemon.snapshot import take_snapshot
from server.db import accounts
from server.db.accounts import Account, read_accounts
from server.db.tables import Counter, Daemon, Job, Run, Tenant
from tests.server.conftest import Caller, new_tenant
from tests.server.daemon.conftest import PLAIN, Life, counter, job, submit


@pytest.fixture
def tenants(life: Life, app: FastAPI, admin: Caller) -> list[Caller]:
    """Three, of whom the first has two jobs and the others one each."""
    callers = [new_tenant(app, admin, f"tenant-{number}") for number in range(3)]
    for caller, priority in ((0, "normal"), (1, "normal"), (2, "low"), (0, "high")):
        submit(callers[caller], PLAIN, priority=priority)
    return callers


def set_counter(services: Services, caller: Caller, **values: float) -> None:
    with services.database.write() as session:
        for name, value in values.items():
            setattr(session.get_one(Counter, (caller.tenant_id, 1)), name, value)


def read(life: Life, *named: Caller, num_others: int = 9) -> list[Account]:
    with life.books.read() as session:
        ids = [caller.tenant_id for caller in named]
        base_hash, seat = life.loop.engine.base.hash, life.books.seat
        found, _ = read_accounts(session, base_hash, seat, named=ids, num_others=num_others)
        return found


def orders(found: list[Account]) -> list[int | None]:
    return [one.next.order if one.next else None for one in found]


def test_a_tenants_next_job_is_the_first_of_the_highest_priority(tenants: list[Caller], life: Life) -> None:
    assert orders(read(life, tenants[0], num_others=0)) == [4]
    tenants[0].post(f"/jobs/{newest_job(life)}/cancel")
    assert orders(read(life, tenants[0], num_others=0)) == [1]


def newest_job(life: Life) -> str:
    with life.books.read() as session:
        return session.query(Job).order_by(Job.number.desc()).first().id


@pytest.mark.parametrize(("before", "after"), [(0.01, 1), (0.5, 0.01)])
def test_with_a_new_share_a_tenant_stays_ahead_by_as_much_work(
    before: float,
    after: float,
    new_life: Callable[..., Life],
    alice: Caller,
    bob: Caller,
    admin: Caller,
    services: Services,
) -> None:
    path = f"/admin/tenants/{alice.tenant_id}"
    admin.patch(path, json={"share": before})
    life = new_life(token_budget=256)
    for caller in (alice, bob):
        submit(caller, PLAIN, steps=500, batch=1)
    life.turn_until(lambda: counter(services, alice).counter > life.loop.recorder.floor)
    ahead = (counter(services, alice).counter - life.loop.recorder.floor) * before
    admin.patch(path, json={"share": after})
    assert (counter(services, alice).counter - life.loop.recorder.floor) * after == pytest.approx(ahead)


def test_other_tenants_come_by_counter_then_by_submission_and_no_more_than_asked(
    tenants: list[Caller], life: Life, services: Services
) -> None:
    set_counter(services, tenants[1], counter=5.0)
    assert orders(read(life)) == [3, 4, 2]
    assert orders(read(life, num_others=2)) == [3, 4]
    assert orders(read(life, tenants[1], num_others=1)) == [2, 3]


def test_who_is_named_is_read_without_a_job_too_and_who_is_not_only_with_one(
    tenants: list[Caller], life: Life, alice: Caller
) -> None:
    assert orders(read(life, alice)) == [None, 2, 3, 4]
    assert alice.tenant_id not in {one.tenant_id for one in read(life)}


def test_a_snapshot_does_not_grow_with_the_queue(tenants: list[Caller], life: Life, alice: Caller) -> None:
    def size() -> int:
        snapshot = take_snapshot(
            life.books,
            [],
            life.settings.model_copy(update={"max_resident_runs": 2}),
            base_hash=life.loop.engine.base.hash,
            fill_min=1,
            floor=0.0,
            draining=False,
            sampled={},
        )
        return len(snapshot.tenants)

    assert size() == 2
    submit(alice, PLAIN)
    assert size() == 2


def test_a_credit_of_who_is_away_counts_from_where_it_would_be_lifted_to(
    tenants: list[Caller], life: Life, services: Services
) -> None:
    away, there = tenants[:2]
    set_counter(services, away, counter=10.0)
    set_counter(services, there, counter=10.0, backlogged=True)
    with services.database.write() as session:
        session.query(Tenant).update({"share": 2.0})
        session.query(Daemon).order_by(Daemon.epoch.desc()).first().floor = 100.0
    with life.books.write() as session:
        for caller in (away, there):
            run = session.query(Run).filter_by(tenant_id=caller.tenant_id).first()
            run.cost_charged = 50
            session.flush()
            accounts.give_back(session, run, life.books.seat, weight=4, cost=40, tokens=0)
            session.refresh(run)
            assert (run.cost_charged, run.counter) == (10, -10.0)
    by_id = {one.tenant_id: one for one in read(life, away, there)}
    assert by_id[away.tenant_id].counter == 100.0 - 20.0
    assert by_id[there.tenant_id].counter == 10.0 - 20.0
    assert by_id[away.tenant_id].backlogged  # or the next plan would lift it over its credit


def test_what_others_make_fail_is_not_charged(life: Life, alice: Caller, bob: Caller, services: Services) -> None:
    """The gang in which a neighbour breaks the pass costs a tenant its time, not its share."""
    mine, broken = submit(alice, PLAIN), submit(bob, PLAIN)
    life.turn_until(lambda: len(life.roster.residents) == 2 and life.step_of(mine) == 2)
    before = books(services, alice)
    rows = life.resident(broken).program.train.tokens
    rows[:] = 10**6  # no such token
    life.turn()
    assert job(services, mine).step == 2
    assert books(services, alice) == pytest.approx(before)
    life.finish()
    assert (job(services, mine).status, job(services, broken).status) == ("succeeded", "failed")


def books(services: Services, caller: Caller) -> tuple[float, int]:
    """(counter, cost charged to its only run) of a tenant of share 1."""
    with services.database.read() as session:
        run = session.query(Run).filter_by(tenant_id=caller.tenant_id).one()
    return counter(services, caller).counter, run.cost_charged
