"""Each daemon is a fair queue of its own: the seats of lives, and the counters that belong to them."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import select

from server.api.services import Services
from server.daemon.books import Books
from server.daemon.snapshot import take_snapshot
from server.db import accounts, daemons, leases, runs
from server.db import tables as t
from tests.server.conftest import Caller, new_tenant
from tests.server.daemon.conftest import PLAIN, Life, counter, job, points, submit

LONG = 500
"""Steps: more than any test here takes."""


def begin(services: Services, **values: Any) -> Books:
    return Books.begin(services.database, lease_seconds=60.0, **values)


def seats_of(services: Services, tenant: Caller) -> list[int]:
    """Where a tenant has a counter."""
    with services.database.read() as reading:
        mine = select(t.Counter.seat).where(t.Counter.tenant_id == tenant.tenant_id)
        return list(reading.scalars(mine.order_by(t.Counter.seat)))


@pytest.mark.databases("postgresql")
def test_who_begins_takes_the_smallest_seat_that_is_free(services: Services) -> None:
    lives = [begin(services, name="one") for _ in range(3)]
    assert [books.seat for books in lives] == [1, 2, 3]
    lives[1].end()
    assert [begin(services, name="one").seat for _ in range(2)] == [2, 4]
    assert begin(services, before=lives[0].epoch).seat == 1


@pytest.mark.databases("postgresql")
def test_who_has_lost_its_life_goes_on_with_its_own_seat_though_a_smaller_one_is_free(services: Services) -> None:
    first, second, third = (begin(services) for _ in range(3))
    first.end()
    assert begin(services, before=second.epoch).seat == 2
    third.end()
    assert begin(services).seat == 1
    assert begin(services).seat == 3
    assert begin(services, before=third.epoch).seat == 4


@pytest.mark.databases("sqlite")
def test_who_is_alone_has_the_first_seat(services: Services) -> None:
    assert [begin(services).seat for _ in range(3)] == [1, 1, 1]


@pytest.mark.databases("postgresql")
def test_two_that_begin_at_once_take_two_seats(services: Services) -> None:
    with ThreadPoolExecutor(1) as pool:
        with services.database.write() as writing:
            first = daemons.begin_life(writing, pid=1, supervisor=None, name=None, lease_seconds=60.0)
            second = pool.submit(begin, services)
            with suppress(TimeoutError):
                second.result(0.3)
        assert (first.seat, second.result(30).seat) == (1, 2)


@pytest.mark.databases("postgresql")
def test_a_tenant_that_is_added_while_a_daemon_begins_has_a_counter_with_it(
    services: Services, app: FastAPI, admin: Caller, alice: Caller
) -> None:
    with ThreadPoolExecutor(1) as pool:
        with services.database.write() as writing:
            daemons.begin_life(writing, pid=1, supervisor=None, name=None, lease_seconds=60.0)
            added = pool.submit(new_tenant, app, admin, "bob")
            with suppress(TimeoutError):
                added.result(0.3)
        bob = added.result(30)
    assert [seats_of(services, tenant) for tenant in (alice, bob)] == [[1], [1]]


@pytest.mark.databases("postgresql")
def test_each_tenant_has_a_counter_with_each_daemon_whoever_came_first(
    services: Services, app: FastAPI, admin: Caller, alice: Caller
) -> None:
    first, second = begin(services), begin(services)
    bob = new_tenant(app, admin, "bob")
    second.end()
    carol = new_tenant(app, admin, "carol")
    assert [seats_of(services, tenant) for tenant in (alice, bob, carol)] == [[1, 2], [1, 2], [1]]
    begin(services)
    assert seats_of(services, carol) == [1, 2]
    first.end()


@pytest.mark.databases("postgresql")
def test_who_starts_again_goes_on_with_its_counters_and_its_floor(
    new_life: Callable[..., Life], alice: Caller, bob: Caller, services: Services
) -> None:
    one, two = new_life(supervisor="one"), new_life(supervisor="two")
    submit(alice, PLAIN, steps=LONG)
    two.turn(6)
    reached, floor = counter(services, alice, 2).counter, two.loop.recorder.floor
    assert reached == floor > 0
    one, two = new_life(supervisor="one"), new_life(supervisor="two")
    assert (one.books.seat, two.books.seat) == (1, 2)
    assert [life.loop.recorder.floor for life in (one, two)] == [0.0, floor]
    assert [counter(services, alice, seat).counter for seat in (1, 2)] == [0.0, reached]
    submit(bob, PLAIN, steps=LONG)
    two.turn(4)
    assert counter(services, bob, 2).counter >= floor
    assert [counter(services, tenant, 1).counter for tenant in (alice, bob)] == [0.0, 0.0]


@pytest.mark.databases("postgresql")
def test_each_daemon_says_for_itself_who_is_backlogged(alice: Caller, bob: Caller, services: Services) -> None:
    for books, tenant in ((begin(services), alice), (begin(services), bob)):
        with books.write() as writing:
            accounts.set_backlogged(writing, books.seat, frozenset({tenant.tenant_id}))
    flags = [[counter(services, tenant, seat).backlogged for tenant in (alice, bob)] for seat in (1, 2)]
    assert flags == [[True, False], [False, True]]


class Rides:
    """The rides of the runs that a daemon has in memory, and how long each has waited."""

    def __init__(self, life: Life):
        self.life = life
        self.cost = Counter[str]()  # by tenant
        self._waited = Counter[str]()  # gangs, by run
        self._promised: dict[str, int] = {}

    def turn(self) -> None:
        before = {one.run_id: one.cost_charged for one in self.life.loop.residents}
        self.life.turn()
        for one in self.life.loop.residents:
            cost = one.cost_charged - before.get(one.run_id, one.cost_at_claim)
            self.cost[one.job.tenant_id] += cost
            if cost:
                self._waited.pop(one.run_id, None)
                self._promised.pop(one.run_id, None)
                continue
            self._waited[one.run_id] += 1
            promised = self._promised.setdefault(one.run_id, self.life.loop.longest_wait)
            assert self._waited[one.run_id] < promised, "it waits for more gangs than was promised"


def largest_cost(life: Life) -> int:
    """L, of a daemon."""
    loop = life.loop
    snapshot = take_snapshot(
        loop.books,
        loop.residents,
        loop.settings,
        base_hash=loop.engine.base.hash,
        fill_min=loop.fill_min,
        floor=loop.recorder.floor,
        draining=False,
        sampled={},
    )
    return snapshot.max_microbatch_cost


NARROW = {"token_budget": 256, "recovery_steps": 0}
"""A gang has room for one microbatch of the jobs below."""


def submit_wide(tenant: Caller) -> str:
    """A job whose steps have many microbatches."""
    return submit(tenant, PLAIN, steps=LONG, rows=64, batch=64)


@pytest.mark.databases("postgresql")
def test_who_trains_with_two_daemons_has_its_share_of_each(
    new_life: Callable[..., Life], alice: Caller, bob: Caller
) -> None:
    one = new_life(supervisor="one", **NARROW)
    submit_wide(alice)
    one.turn(20)
    two = Rides(new_life(supervisor="two", **NARROW))
    for tenant in (alice, bob):
        submit_wide(tenant)
    two.life.turn_until(lambda: len(two.life.loop.residents) == 2)
    for _ in range(24):
        one.turn()
        two.turn()
    assert len(one.loop.residents) == 1
    served = [two.cost[tenant.tenant_id] for tenant in (alice, bob)]
    assert abs(served[0] - served[1]) <= 2 * largest_cost(two.life) < min(served)


@pytest.mark.databases("postgresql")
def test_a_run_that_comes_from_another_daemon_does_not_wait_until_its_siblings_have_had_as_much(
    new_life: Callable[..., Life], alice: Caller
) -> None:
    one = Rides(new_life(supervisor="one", max_resident_runs=1, **NARROW))
    stays = submit_wide(alice)
    one.turn()
    two = new_life(supervisor="two", **NARROW)
    comes = submit_wide(alice)
    two.turn(30)
    ahead = two.resident(comes).cost_charged - one.life.resident(stays).cost_charged
    for resident in two.loop.residents:
        two.roster.save(resident)
    two.writer.wait()
    two.books.end()
    one.life.settings.max_resident_runs = 2
    one.life.turn_until(lambda: len(one.life.loop.residents) == 2)
    before = {id_: one.life.resident(id_).cost_charged for id_ in (stays, comes)}
    for _ in range(20):
        one.turn()
    served = [one.life.resident(id_).cost_charged - was for id_, was in before.items()]
    assert abs(served[0] - served[1]) <= 2 * largest_cost(one.life) < min(ahead, *served)


@pytest.mark.databases("postgresql")
def test_what_a_dead_daemon_s_run_has_lost_is_given_back_where_it_was_charged(
    new_life: Callable[..., Life], alice: Caller, services: Services
) -> None:
    """Also where the next daemon that claims it dies of that."""

    def charged() -> list[float]:
        return [counter(services, alice, seat).counter for seat in (1, 2)]

    one, two = new_life(supervisor="one"), new_life(supervisor="two")
    id_ = submit(alice, PLAIN, steps=LONG)
    two.turn(8)
    lost, before = lost_of(services, two, id_), charged()
    run_id = two.resident(id_).run_id
    with one.books.write() as writing:
        leases.end_dead(writing, supervisor="two")
        assert runs.claim(writing, run_id, one.books.epoch, {})
    one = new_life(supervisor="one")
    assert one.roster.attach(run_id, alone=True)
    assert charged() == pytest.approx([before[0], before[1] - lost])
    one.turn(2)
    lost, before = lost_of(services, one, id_), charged()
    one = new_life(supervisor="one")
    assert one.roster.attach(run_id, alone=True)
    assert charged() == pytest.approx([before[0] - lost, before[1]])
    one.turn(2)
    metered = [counter(services, alice, seat).trained_tokens for seat in (1, 2)]
    assert alice.get("/usage").json()["trained_tokens"] == sum(metered) == job(services, id_).tokens
    assert min(metered) > 0


def lost_of(services: Services, life: Life, job_id: str) -> int:
    """What was charged since the newest recovery point."""
    lost = life.resident(job_id).cost_charged - points(services, job_id)[0].cost_charged
    assert lost > 0
    return lost


@pytest.mark.databases("postgresql")
def test_a_credit_with_another_daemon_is_none_for_the_time_until_its_tenant_comes_there_again(
    new_life: Callable[..., Life], alice: Caller, bob: Caller, services: Services
) -> None:
    one, two = new_life(supervisor="one", **NARROW), new_life(supervisor="two", **NARROW)
    goes = submit_wide(alice)
    two.turn(10)
    run_id = two.resident(goes).run_id
    two.roster.abandon(two.resident(goes))
    alice.post(f"/jobs/{goes}/pause")
    submit_wide(bob)
    two.turn(2)
    alice.post(f"/jobs/{goes}/resume")
    before = counter(services, alice, 2).counter
    assert one.roster.attach(run_id)
    assert counter(services, alice, 2).counter < before
    two.turn(20)
    submit_wide(alice)
    two.turn_until(lambda: len(two.loop.residents) == 2)
    gap = counter(services, bob, 2).counter - counter(services, alice, 2).counter
    assert abs(gap) <= largest_cost(two)


@pytest.mark.databases("postgresql")
def test_a_tenant_that_is_new_to_a_daemon_begins_at_its_floor(
    new_life: Callable[..., Life], alice: Caller, bob: Caller, app: FastAPI, admin: Caller, services: Services
) -> None:
    one, two = new_life(supervisor="one", **NARROW), Rides(new_life(supervisor="two", **NARROW))
    submit_wide(alice)
    two.life.turn(20)
    carol = new_tenant(app, admin, "carol")
    for tenant in (bob, carol):
        submit_wide(tenant)
    two.life.turn_until(lambda: len(two.life.loop.residents) == 3)
    two.cost.clear()
    for _ in range(30):
        two.turn()
    served = [two.cost[tenant.tenant_id] for tenant in (alice, bob, carol)]
    assert max(served) - min(served) <= 2 * largest_cost(two.life) < min(served)
    assert not one.loop.residents


def test_runs_that_have_lost_work_together_come_back_side_by_side(
    new_life: Callable[..., Life], alice: Caller, services: Services
) -> None:
    first = new_life(recovery_seconds=1e9, **NARROW)
    ids = [submit_wide(alice) for _ in range(4)]
    first.turn(30)
    life = new_life(recovery_seconds=1e9, **NARROW)  # the first one is gone as after kill -9
    life.turn_until(lambda: len(life.loop.residents) == 4)
    before = [life.resident(id_).cost_charged for id_ in ids]
    life.turn(40)
    served = [life.resident(id_).cost_charged - was for id_, was in zip(ids, before, strict=True)]
    assert max(served) - min(served) <= 2 * largest_cost(life) < min(served)


def test_a_run_without_memory_for_its_step_is_let_go_when_what_it_was_charged_is_written(
    life: Life, alice: Caller, bob: Caller, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [submit(tenant, PLAIN, steps=LONG) for tenant in (alice, bob)]
    life.turn_until(lambda: len(life.loop.residents) == 2)
    life.turn(3)
    let_go: list[str] = []

    def no_memory(*_: Any, **__: Any) -> float:
        monkeypatch.undo()
        monkeypatch.setattr(life.roster, "abandon", watched)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    def watched(resident: Any) -> None:
        with services.database.read() as reading:
            assert reading.get_one(t.Run, resident.run_id).cost_charged == resident.cost_charged
        let_go.append(resident.job.id)
        abandon(resident)

    abandon = life.roster.abandon
    monkeypatch.setattr(life.loop.engine, "optim_step", no_memory)
    life.turn_until(lambda: bool(let_go))
    assert let_go[0] in ids
    assert job(services, let_go[0]).status == "queued"
