"""Leases: who holds a run writes, nobody else does, and who cannot say that it lives has let go in time."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import delete, select, update

from server.api.services import Services
from server.daemon.books import Books
from server.db import accounts, daemons, drains, operations, runs
from server.db import tables as t
from server.db.daemons import Fenced
from server.states import RESIDENT
from tests.server.conftest import Caller
from tests.server.daemon.conftest import (
    MIXTURE,
    PLAIN,
    Gate,
    Life,
    counter,
    events,
    final_hash,
    job,
    points,
    steps,
    submit,
)

AT_ONCE_SECONDS = 3.0
"""Who waits for a lock waits longer."""


def begin(services: Services, lease_seconds: float = 60.0, **values: Any) -> Books:
    return Books.begin(services.database, lease_seconds=lease_seconds, **values)


def write(books: Books) -> None:
    with books.write() as writing:
        daemons.update_daemon(writing, books.epoch, state="ready")


def expire(services: Services, epoch: int) -> None:
    """Let a lease run out, as the database's clock would."""
    with services.database.write() as writing:
        writing.execute(update(t.Daemon).where(t.Daemon.epoch == epoch).values(expires_at=0.0))


@pytest.fixture
def meanwhile() -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """What a function returns at once in a thread of its own, whatever this one holds."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda do: pool.submit(do).result(AT_ONCE_SECONDS)


def test_who_could_not_renew_for_half_the_lease_writes_nothing_until_it_can(services: Services) -> None:
    books = begin(services, lease_seconds=1.0)
    write(books)
    time.sleep(0.6)
    with pytest.raises(Fenced, match="last renewed"):
        write(books)
    books.renew()
    write(books)


def test_a_machine_s_clock_that_is_set_neither_ends_a_lease_nor_prolongs_it(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    for jump in (3600.0, -3600.0):
        books = begin(services, lease_seconds=2.0)
        with monkeypatch.context() as context:
            context.setattr(time, "time", lambda real=time.time, jump=jump: real() + jump)
            write(books)
            time.sleep(1.1)
            with pytest.raises(Fenced, match="last renewed"):
                write(books)
            books.renew()
            write(books)


def test_who_finds_a_write_of_its_own_gone_writes_nothing_more(services: Services, life: Life) -> None:
    """As after the failover to a standby that lagged behind, of which no connection has to tell."""
    life.turn()
    with services.database.write() as writing:
        writing.execute(update(t.Daemon).values(writes=t.Daemon.writes - 1))
    for late in (life.turn, life.books.renew, lambda: write(life.books)):
        with pytest.raises(Fenced, match="has lost"):
            late()
    with services.database.write() as writing:
        writing.execute(delete(t.Daemon).where(t.Daemon.epoch == life.books.epoch))
    with pytest.raises(Fenced, match="has lost"):
        write(life.books)


@pytest.mark.databases("postgresql")
def test_lives_stand_side_by_side_until_one_expires(services: Services) -> None:
    first, second = begin(services), begin(services)
    for books in (first, second, first):
        books.renew()
        write(books)
    expire(services, first.epoch)
    second.renew()
    for late in (first.renew, lambda: write(first), first.end):
        with pytest.raises(Fenced, match="is over"):
            late()
    write(second)


@pytest.mark.databases("sqlite")
def test_who_holds_the_data_directory_is_alone(services: Services) -> None:
    first, second = begin(services), begin(services)
    write(second)
    with pytest.raises(Fenced):
        write(first)


@pytest.mark.databases("postgresql")
def test_a_supervisor_s_new_child_does_not_wait_for_the_lease_of_the_dead_one(services: Services) -> None:
    first, other = begin(services, supervisor="one"), begin(services, supervisor="other")
    begin(services, supervisor="one")
    with pytest.raises(Fenced):
        write(first)
    write(other)


@pytest.mark.databases("postgresql")
def test_only_the_database_s_clock_ends_a_lease(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = begin(services), begin(services)
    for jump in (86400.0, -86400.0):
        with monkeypatch.context() as context:
            context.setattr(time, "time", lambda now=time.time(), jump=jump: now + jump)
            second.renew()
            first.renew()
            with services.database.read() as reading:
                assert [one.epoch for one in daemons.live_daemons(reading)] == [second.epoch, first.epoch]


class Claims(RuleBasedStateMachine):
    """Lives come, renew, expire, take runs and write; the model knows who holds what."""

    services: Services
    run_ids: list[str]

    def __init__(self) -> None:
        super().__init__()
        self.lives: list[Books] = []
        self.over: set[int] = set()  # epochs
        self.expired: set[int] = set()
        self.holder: dict[str, int] = {}  # run id -> epoch
        self.steps = dict.fromkeys(self.run_ids, 0)
        with self.services.database.write() as writing:
            writing.execute(update(t.Daemon).values(ended_at=1.0))
            writing.execute(update(t.Job).values(status="queued", step=0))
            writing.execute(update(t.Run).values(crashes=0, crash_step=None))
            writing.query(t.Metric).delete()

    def reap(self) -> None:
        self.over |= self.expired
        self.holder = {run: epoch for run, epoch in self.holder.items() if epoch not in self.over}

    @precondition(lambda self: len(self.lives) < 4)
    @rule()
    def begin(self) -> None:
        self.reap()
        self.lives.append(begin(self.services))

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        books = data.draw(st.sampled_from(self.lives))
        expire(self.services, books.epoch)
        self.expired.add(books.epoch)

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        books = data.draw(st.sampled_from(self.lives))
        if books.epoch in self.over:
            with pytest.raises(Fenced):
                books.renew()
            return
        books.renew()
        self.expired.discard(books.epoch)
        self.reap()

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def claim(self, data: st.DataObject) -> None:
        books, run_id = data.draw(st.sampled_from(self.lives)), data.draw(st.sampled_from(self.run_ids))
        claimed = False
        with suppress(Fenced), books.write() as writing:
            claimed = runs.claim(writing, run_id, books.epoch, {}, alone=True)
        is_free = run_id not in self.holder and self.status(run_id) != "failed"
        assert claimed == (books.epoch not in self.over and is_free)
        if claimed:
            self.holder[run_id] = books.epoch

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def write_step(self, data: st.DataObject) -> None:
        books, run_id = data.draw(st.sampled_from(self.lives)), data.draw(st.sampled_from(self.run_ids))
        step = self.steps[run_id] + 1
        metric = {"step": step, "epoch": 0.0, "tokens": step, "train_loss": 0.0, "learning_rate": 0.0}
        metric |= {"grad_norm": 0.0, "tokens_per_second": 0.0, "gang": 1, "gang_jobs": 1}
        with suppress(Fenced), books.write() as writing:
            runs.add_steps(writing, [runs.StepRow(self.job_of(run_id), metric, None)], books.epoch)
        if self.holder.get(run_id) == books.epoch and books.epoch not in self.over:
            self.steps[run_id] = step

    @invariant()
    def the_database_is_of_the_same_mind(self) -> None:
        with self.services.database.read() as reading:
            rows = reading.execute(select(t.Run.id, t.Run.lease_epoch, t.Job.status, t.Job.step).join(t.Job)).all()
        assert {row.id: row.lease_epoch for row in rows if row.status in RESIDENT} == self.holder
        assert {row.id: row.step for row in rows} == self.steps

    def status(self, run_id: str) -> str:
        with self.services.database.read() as reading:
            return reading.scalars(select(t.Job.status).join(t.Run).where(t.Run.id == run_id)).one()

    def job_of(self, run_id: str) -> str:
        with self.services.database.read() as reading:
            return reading.get_one(t.Run, run_id).job_id


@pytest.mark.databases("postgresql")
@pytest.mark.usefixtures("base")
def test_in_whatever_order_things_happen_a_step_is_written_by_its_holder_alone(
    alice: Caller, services: Services
) -> None:
    for _ in range(2):
        submit(alice, PLAIN)
    with services.database.read() as reading:
        Claims.run_ids = list(reading.scalars(select(t.Run.id)))
    Claims.services = services
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    few = hypothesis_settings(max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=checks)
    run_state_machine_as_test(Claims, settings=few)


@pytest.mark.databases("postgresql")
def test_two_daemons_share_the_runs_and_an_overtaken_one_finds_out(
    life: Life, new_life: Callable[..., Life], alice: Caller, services: Services
) -> None:
    alone = [submit(alice, adapter) for adapter in (MIXTURE, PLAIN)]
    life.finish()
    undisturbed = [final_hash(services, id_) for id_ in alone]

    ids = [submit(alice, adapter) for adapter in (MIXTURE, PLAIN)]
    other = new_life(supervisor="another")
    life.turn()
    other.turn()
    assert [len(one.roster.residents) for one in (life, other)] == [1, 1]
    for _ in range(3):
        life.turn()
        other.turn()
    expire(services, life.books.epoch)
    other.books.renew()
    with pytest.raises(Fenced):
        life.loop.decide()  # it was stopped when it had looked at its life in the books
    with pytest.raises(Fenced):
        life.loop.turn()
    other.finish()
    assert [final_hash(services, id_) for id_ in ids] == undisturbed
    assert [steps(services, id_) for id_ in ids] == [list(range(1, 13))] * 2


@pytest.mark.databases("postgresql")
def test_two_daemons_that_write_the_accounts_of_the_same_tenants_do_not_lock_each_other_out(
    alice: Caller, bob: Caller, services: Services
) -> None:
    """Each has written of both when either says which of them is backlogged."""
    lives, together = {alice: begin(services), bob: begin(services)}, threading.Barrier(2)

    def add_up(caller: Caller) -> None:
        books = lives[caller]
        with books.write() as writing:
            both = {one.tenant_id: 1 for one in lives}
            accounts.charge(writing, books.seat, rises=both, run_rises={}, costs={}, refunds={}, trained=both)
            together.wait(AT_ONCE_SECONDS)
            accounts.meter_sampling(writing, books.seat, both, both)
            accounts.set_backlogged(writing, books.seat, frozenset({caller.tenant_id}))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(add_up, lives))
    for caller, books in lives.items():
        for tenant in lives:
            found = counter(services, tenant, books.seat)
            assert (found.counter, found.trained_tokens, found.backlogged) == (1.0, 1, tenant is caller)


@pytest.mark.databases("postgresql")
@pytest.mark.usefixtures("base")
def test_a_run_that_another_daemon_is_about_to_claim_is_not_waited_for(
    meanwhile: Callable[..., Any], alice: Caller, services: Services
) -> None:
    submit(alice, PLAIN)
    first, second = begin(services), begin(services)
    with services.database.read() as reading:
        run_id = reading.scalars(select(t.Run.id)).one()

    def claim() -> bool:
        with second.write() as writing:
            return runs.claim(writing, run_id, second.epoch, {})

    with first.write() as writing:
        assert runs.claim(writing, run_id, first.epoch, {})
        assert meanwhile(claim) is False
    assert claim() is False


@pytest.mark.databases("postgresql")
def test_an_operation_that_another_daemon_is_about_to_take_is_not_waited_for(
    meanwhile: Callable[..., Any], services: Services
) -> None:
    first, second = begin(services), begin(services)
    with services.database.write() as writing:
        asked = {"tenant_id": "ten_a", "adapter_id": None, "base_hash": "0123abcd", "deadline": 0.0}
        operations.add_sample(writing, id_="op_a", key="operations/op_a", **asked)  # type: ignore[arg-type]

    def take() -> list[t.Operation]:
        with second.write() as writing:
            return operations.start_pending(writing, "0123abcd", second.epoch)

    with first.write() as writing:
        assert len(operations.start_pending(writing, "0123abcd", first.epoch)) == 1
        assert meanwhile(take) == []
    assert take() == []


@pytest.mark.databases("postgresql")
def test_a_dead_life_whose_row_somebody_holds_is_left_for_the_next_heartbeat(
    meanwhile: Callable[..., Any], services: Services
) -> None:
    dead, other = begin(services), begin(services)
    expire(services, dead.epoch)
    with dead.write():
        meanwhile(other.renew)
    write(dead)
    other.renew()
    with pytest.raises(Fenced, match="is over"):
        write(dead)


@pytest.mark.databases("postgresql")
def test_what_a_daemon_still_writes_of_an_ended_job_no_other_one_erases(
    life: Life, gate: Gate, new_life: Callable[..., Life], alice: Caller, services: Services
) -> None:
    id_ = submit(alice, MIXTURE)
    life.turn_until(lambda: job(services, id_).step == 6)
    other = new_life(supervisor="another")
    gate.close(f"recovery/{life.resident(id_).run_id}/being-written")
    alice.post(f"/jobs/{id_}/cancel")
    other.turn(2)
    gate.open()
    life.turn(2)
    assert not list(services.store.path("recovery").glob("*/*"))
    assert not points(services, id_)


@pytest.mark.databases("postgresql")
def test_who_was_out_of_touch_blames_nobody_whose_lease_ran_out_meanwhile(
    life: Life, new_life: Callable[..., Life], alice: Caller, services: Services
) -> None:
    ids = [submit(alice, PLAIN), submit(alice, PLAIN)]
    other = new_life(supervisor="another")
    for one in (life, other):
        one.turn()
    for one in (life, other):
        expire(services, one.books.epoch)
    begin(services, before=life.books.epoch)
    assert [job(services, id_).status for id_ in ids] == ["queued"] * 2
    with services.database.read() as reading:
        assert set(reading.scalars(select(t.Run.crashes))) == {0}


@pytest.mark.databases("postgresql")
def test_the_runs_of_a_daemon_that_is_drained_go_on_in_another(
    undisturbed: str, life: Life, new_life: Callable[..., Life], alice: Caller, services: Services
) -> None:
    id_ = submit(alice, MIXTURE)
    life.turn_until(lambda: job(services, id_).step == 4)
    other = new_life(supervisor="another", name="two")
    values = {"mode": "quick", "deadline_seconds": None, "reason": "", "exit_": False, "created_by": "admin"}
    with services.database.write() as writing:
        drain = drains.add_drain(writing, daemon="one", **values)  # type: ignore[arg-type]
    life.turn(2)
    with services.database.read() as reading:
        assert drains.is_at_rest(reading, drain)
    other.finish()
    assert final_hash(services, id_) == undisturbed
    assert steps(services, id_) == list(range(1, 13))
    with services.database.read() as reading:
        assert reading.scalars(select(t.Run.lease_epoch)).one() == other.books.epoch


def reason(tenant: Caller, job_id: str) -> str | None:
    """Why a job waits; None if it does not."""
    queue = tenant.get(f"/jobs/{job_id}").json()["queue"]
    return None if queue is None else queue["reason"]


class TestSuspects:
    """Jobs that were resident when a daemon died again and again."""

    def crash(self, new_life: Callable[..., Life], times: int, turns: int = 2) -> Life:
        """Lives of which each dies after so many turns; the next one."""
        life = new_life()
        for _ in range(times):
            life.turn(turns)
            life = new_life()
        return life

    def test_who_keeps_killing_is_tried_alone_then_failed_and_the_others_go_on(
        self, life: Life, new_life: Callable[..., Life], alice: Caller, services: Services
    ) -> None:
        lonely = submit(alice, MIXTURE)
        life.finish()
        poison, innocent = submit(alice, PLAIN, name="poison"), submit(alice, MIXTURE)
        tried = self.crash(new_life, runs.SUSPECT_CRASHES)
        assert {events(services, id_)[-1] for id_ in (poison, innocent)} == {"suspected"}
        assert reason(alice, innocent) == "trial"
        tried.turn()
        assert [one.job.id for one in tried.roster.residents.values()] == [poison]
        assert reason(alice, innocent) == "trial"
        last = self.crash(new_life, 1, turns=0)
        error = job(services, poison).error
        assert error is not None
        assert error["code"] == "crashed_daemon"
        assert f"died {runs.SUSPECT_CRASHES + 1} times" in error["message"]
        last.turn()
        assert reason(alice, innocent) is None
        last.finish()
        assert final_hash(services, innocent) == final_hash(services, lonely)

    @pytest.mark.databases("postgresql")
    @pytest.mark.usefixtures("life")
    def test_others_wait_for_the_trial_unless_another_daemon_takes_them_in(
        self, new_life: Callable[..., Life], alice: Caller, services: Services
    ) -> None:
        suspect = submit(alice, PLAIN)
        life = self.crash(new_life, runs.SUSPECT_CRASHES)
        late = submit(alice, MIXTURE)
        other = begin(services, name="other")
        with other.write() as writing:
            daemons.update_daemon(writing, other.epoch, base_hash=life.loop.engine.base.hash, state="ready")
        assert [reason(alice, one) for one in (suspect, late)] == ["trial"] * 2, "either may try it"
        life.turn()
        assert [reason(alice, one) for one in (suspect, late)] == [None, "fair_share"]
        values = {"mode": "quick", "deadline_seconds": None, "reason": "", "exit_": False, "created_by": "admin"}
        with services.database.write() as writing:
            drains.add_drain(writing, daemon="other", **values)  # type: ignore[arg-type]
        assert reason(alice, late) == "trial"
        life.finish()
        assert reason(alice, late) is None

    @pytest.mark.usefixtures("life")
    def test_who_gets_further_alone_is_acquitted(
        self, new_life: Callable[..., Life], alice: Caller, services: Services
    ) -> None:
        ids = [submit(alice, PLAIN), submit(alice, PLAIN)]
        life = self.crash(new_life, runs.SUSPECT_CRASHES)
        seen: set[frozenset[str]] = set()
        for _ in range(12):
            life.turn()
            seen.add(frozenset(one.job.id for one in life.roster.residents.values() if not one.is_closing))
        assert seen >= {frozenset({id_}) for id_ in ids}, "each was tried alone"
        life.finish()
        assert final_hash(services, ids[0]) == final_hash(services, ids[1])
        with services.database.read() as reading:
            assert set(reading.scalars(select(t.Run.crashes))) == {0}

    def test_a_life_that_ends_by_its_own_hand_counts_for_nobody(
        self, life: Life, alice: Caller, services: Services
    ) -> None:
        submit(alice, PLAIN)
        life.turn(2)
        begin(services, before=life.books.epoch)
        with services.database.read() as reading:
            assert reading.scalars(select(t.Run.crashes)).one() == 0
            assert reading.scalars(select(t.Job.status)).one() == "queued"

    def test_who_gave_up_its_place_before_is_not_to_blame(
        self, new_life: Callable[..., Life], alice: Caller, bob: Caller, services: Services
    ) -> None:
        life = new_life(max_resident_runs=1, stay_tokens=1)
        evicted = submit(alice, PLAIN)
        life.turn(2)
        resident = submit(bob, PLAIN)
        life.turn_until(lambda: job(services, resident).status == "running")
        new_life()
        with services.database.read() as reading:
            ended = reading.execute(select(t.Run.job_id, t.Run.crashes, t.Run.lease_epoch)).all()
        assert set(ended) == {(evicted, 0, life.books.epoch), (resident, 1, life.books.epoch)}
