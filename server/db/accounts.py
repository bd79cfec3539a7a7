"""Statements on accounts: what the scheduler decides from, and what its plans add to and never overwrite."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sqlalchemy import BigInteger, Float, String, Text, bindparam, case, cast, func, null, select, union_all, update
from sqlalchemy.orm import Session

from server.db import seats
from server.db.among import among, is_one_of
from server.db.daemons import IS_LIVE
from server.db.given import given
from server.db.session import Reader, rows
from server.db.tables import Counter, Daemon, Run, Tenant
from server.states import RESIDENT, JobStatus


@dataclass(frozen=True)
class Waiting:
    """A tenant's next job to become resident."""

    run_id: str
    counter: float
    order: int
    adapter: str  # resolved, as JSON: of a few kinds in a long queue


@dataclass(frozen=True)
class Account:
    """A tenant as the scheduler sees it."""

    tenant_id: str
    share: float
    counter: float
    backlogged: bool
    next: Waiting | None


_TENANTS, _COUNTERS, _JOBS, _RUNS = (Tenant.metadata.tables[name] for name in ("tenants", "counters", "jobs", "runs"))
_ON_SEAT = _COUNTERS.c.seat == bindparam("on_seat")
_QUEUED = _JOBS.alias("queued")
_NEXT = (
    select(_QUEUED.c.number)
    .where(
        _QUEUED.c.tenant_id == _COUNTERS.c.tenant_id,
        _QUEUED.c.status == JobStatus.QUEUED,
        _QUEUED.c.base_hash == bindparam("base_hash"),
        ~among(cast(_QUEUED.c.number, String), "passed_over"),
    )
    .order_by(_QUEUED.c.weight.desc(), _QUEUED.c.number)
    .limit(1)
    .correlate(_COUNTERS)
    .scalar_subquery()
)
_ACCOUNTS = select(
    *(_TENANTS.c.id, _TENANTS.c.share, _COUNTERS.c.counter, _COUNTERS.c.backlogged),
    *(_RUNS.c.id.label("run_id"), _RUNS.c.counter.label("run_counter"), _JOBS.c.number),
    cast(_JOBS.c.adapter, Text).label("adapter"),
)
_NAMED = (
    _ACCOUNTS.join_from(_COUNTERS, _TENANTS)
    .outerjoin(_JOBS, _JOBS.c.number == _NEXT)
    .outerjoin(_RUNS, _RUNS.c.job_id == _JOBS.c.id)
    .where(_ON_SEAT, among(_COUNTERS.c.tenant_id, "named"))
)
_OTHERS = (
    _ACCOUNTS.join_from(_COUNTERS, _TENANTS)
    .join(_JOBS, _JOBS.c.number == _NEXT)
    .join(_RUNS, _RUNS.c.job_id == _JOBS.c.id)
    .where(_ON_SEAT, ~among(_COUNTERS.c.tenant_id, "named"))
    .order_by(_COUNTERS.c.counter, _JOBS.c.number)
    .limit(bindparam("num_others"))
    .subquery()
)
_RESIDENT = select(
    *(null(), null(), null(), null(), _RUNS.c.id, _RUNS.c.counter, null(), null()),
).where(among(_RUNS.c.id, "run_ids"))
_READ = union_all(_NAMED, select(_OTHERS), _RESIDENT)
_FIRST = select(func.min(Daemon.seat)).where(IS_LIVE, Daemon.base_hash == _JOBS.c.base_hash).scalar_subquery()
_PLACE = case((is_one_of(_JOBS.c.status, RESIDENT), _RUNS.c.seat), else_=func.coalesce(_FIRST, _RUNS.c.seat))
_SHOWN = (
    select(_JOBS.c.id, _COUNTERS.c.counter)
    .join(_RUNS, _RUNS.c.job_id == _JOBS.c.id)
    .join(_COUNTERS, _COUNTERS.c.tenant_id == _JOBS.c.tenant_id)
    .where(among(_JOBS.c.id, "ids"), _COUNTERS.c.seat == _PLACE)
)
_OF_RUNS = given("runs", id=String, rise=Float, cost=BigInteger).c
_CHARGE_RUNS = (
    update(_RUNS)
    .where(_RUNS.c.id == _OF_RUNS.id)
    .values(counter=_RUNS.c.counter + _OF_RUNS.rise, cost_charged=_RUNS.c.cost_charged + _OF_RUNS.cost)
)
_OF_TENANTS = given("tenants", id=String, rise=Float, refund=Float, trained=BigInteger).c
_CHARGE_TENANTS = (
    update(_COUNTERS)
    .where(_ON_SEAT, _COUNTERS.c.tenant_id == _OF_TENANTS.id, _TENANTS.c.id == _OF_TENANTS.id)
    .values(
        counter=_COUNTERS.c.counter + _OF_TENANTS.rise - _OF_TENANTS.refund / _TENANTS.c.share,
        trained_tokens=_COUNTERS.c.trained_tokens + _OF_TENANTS.trained,
    )
)
_IS_NAMED = among(_COUNTERS.c.tenant_id, "named")
_IS_BACKLOGGED = update(_COUNTERS).where(_ON_SEAT, _COUNTERS.c.backlogged.is_(False), _IS_NAMED).values(backlogged=True)
_IS_NOT_BACKLOGGED = (
    update(_COUNTERS).where(_ON_SEAT, _COUNTERS.c.backlogged.is_(True), ~_IS_NAMED).values(backlogged=False)
)
_OF_SAMPLES = given("samples", id=String, prompt=BigInteger, sampled=BigInteger).c
_METER_SAMPLING = (
    update(_COUNTERS)
    .where(_ON_SEAT, _COUNTERS.c.tenant_id == _OF_SAMPLES.id)
    .values(
        prompt_tokens=_COUNTERS.c.prompt_tokens + _OF_SAMPLES.prompt,
        sampled_tokens=_COUNTERS.c.sampled_tokens + _OF_SAMPLES.sampled,
    )
)
_USED = (
    select(
        _COUNTERS.c.tenant_id,
        *(
            cast(func.sum(column), BigInteger)
            for column in _COUNTERS.c["trained_tokens", "prompt_tokens", "sampled_tokens"]
        ),
    )
    .where(among(_COUNTERS.c.tenant_id, "ids"))
    .group_by(_COUNTERS.c.tenant_id)
)


def read_accounts(
    reader: Reader,
    base_hash: str,
    seat: int,
    *,
    named: Collection[str],
    num_others: int,
    run_ids: Collection[str] = (),
    passed_over: Collection[int] = (),
) -> tuple[list[Account], dict[str, float]]:
    """(the tenants named, and of the others with a queued job of this base those of smallest counter on this seat;
    the counter of each of these runs among its tenant's own).

    Each tenant with its next job by priority, then by submission, without those numbered in `passed_over`; runs that
    no longer exist are left out. One statement, and what it reads does not grow with the queue.
    """
    wanted = {
        "base_hash": base_hash,
        "on_seat": seat,
        "named": named,
        "num_others": num_others,
        "run_ids": run_ids,
        "passed_over": [str(number) for number in passed_over],
    }
    found, counters = [], {}
    for tenant_id, share, counter, backlogged, run_id, run_counter, *next_ in rows(reader, _READ, wanted):
        if tenant_id is None:
            counters[run_id] = run_counter
        else:
            waiting = Waiting(run_id, run_counter, *next_) if run_id else None
            found.append(Account(tenant_id, share, counter, backlogged, waiting))
    return found, counters


def shown_counters(reader: Reader, job_ids: Collection[str]) -> dict[str, float]:
    """Of each job its tenant's counter with the daemon that has it in memory, or with the first that may take it.

    One that is missing is of a tenant that was never charged there.
    """
    return dict(rows(reader, _SHOWN, {"ids": job_ids}))


def charge(
    session: Session,
    seat: int,
    *,
    rises: Mapping[str, float],
    run_rises: Mapping[str, float],
    costs: Mapping[str, int],
    refunds: Mapping[str, int],
    trained: Mapping[str, int],
) -> None:
    """Add a plan's increments to the counters, and to each run the token-equivalents that it was charged.

    `refunds` are token-equivalents to take off the counters of tenants, `trained` tokens to be metered. The rows need
    no order: nobody else writes these counters, but for a credit or a new share, which take one row of a seat; and who
    takes runs from a life has its row first, which this transaction holds.
    """
    connection = session.connection()
    if run_ids := run_rises.keys() | costs.keys():
        of_runs = [{"id": id_, "rise": run_rises.get(id_, 0.0), "cost": costs.get(id_, 0)} for id_ in run_ids]
        connection.execute(_CHARGE_RUNS, {"runs": of_runs})
    if tenant_ids := rises.keys() | refunds.keys() | trained.keys():
        of_tenants = [
            {
                "id": id_,
                "rise": rises.get(id_, 0.0),
                "refund": refunds.get(id_, 0),
                "trained": trained.get(id_, 0),
            }
            for id_ in tenant_ids
        ]
        connection.execute(_CHARGE_TENANTS, {"on_seat": seat, "tenants": of_tenants})


def join(session: Session, run_id: str, counter: float) -> None:
    """A run comes into memory where its tenant's others stand, whatever it was given back."""
    session.execute(update(Run).where(Run.id == run_id).values(counter=counter))


def meter_sampling(session: Session, seat: int, prompts: Mapping[str, int], sampled: Mapping[str, int]) -> None:
    """Add the tokens of prompts and of answers to what tenants have used."""
    samples = [{"id": id_, "prompt": prompts[id_], "sampled": sampled.get(id_, 0)} for id_ in prompts]
    session.connection().execute(_METER_SAMPLING, {"on_seat": seat, "samples": samples})


@dataclass(frozen=True)
class Usage:
    """What a tenant has used, in tokens."""

    trained_tokens: int = 0
    prompt_tokens: int = 0
    sampled_tokens: int = 0


def read_usage(reader: Reader, tenant_ids: Collection[str]) -> dict[str, Usage]:
    """Of each tenant, with all daemons together; whom none has known yet is left out."""
    return {id_: Usage(*used) for id_, *used in rows(reader, _USED, {"ids": tenant_ids})}


def give_back(session: Session, run: Run, seat: int, *, weight: int, cost: int, tokens: int) -> None:
    """Take back what was charged and metered for work of a run that is lost, where it was charged.

    On our own `seat` the credit of a tenant that is not backlogged counts from where it would be lifted to, or the lift
    would take it. On another one its daemon says who is backlogged: a tenant that we called so, and that comes there
    much later, would have a credit for all that time.
    """
    if not cost and not tokens:
        return
    session.execute(
        update(Run)
        .where(Run.id == run.id)
        .values(counter=Run.counter - cost / weight, cost_charged=Run.cost_charged - cost)
    )
    credit = cost / select(Tenant.share).where(Tenant.id == run.tenant_id).scalar_subquery()
    account = update(Counter).where(Counter.tenant_id == run.tenant_id, Counter.seat == run.seat)
    account = account.values(trained_tokens=Counter.trained_tokens - tokens)
    if run.seat == seat:
        floor = seats.floor(session, seat)
        start = case((Counter.backlogged | (Counter.counter > floor), Counter.counter), else_=floor)
        session.execute(account.values(counter=start - credit, backlogged=True))
    else:
        session.execute(account.values(counter=Counter.counter - credit))


def reweight(session: Session, tenant_id: str, *, before: float, after: float) -> None:
    """A share changes: what its tenant is ahead by, in cost, stays the same on each seat."""
    mine = select(Counter.seat).where(Counter.tenant_id == tenant_id)
    for seat in session.scalars(mine.order_by(Counter.seat)).all():
        floor = seats.floor(session, seat)
        is_ahead = (Counter.tenant_id == tenant_id, Counter.seat == seat, Counter.counter > floor)
        ahead = (Counter.counter - floor) * (before / after)
        session.execute(update(Counter).where(*is_ahead).values(counter=floor + ahead))


def set_backlogged(session: Session, seat: int, tenant_ids: frozenset[str]) -> None:
    """Keep which tenants the last plan counted as backlogged."""
    connection = session.connection()
    for statement in (_IS_BACKLOGGED, _IS_NOT_BACKLOGGED):
        connection.execute(statement, {"on_seat": seat, "named": tenant_ids})
