"""Statements on accounts: what the scheduler decides from, and what its plans add to and never overwrite."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sqlalchemy import BigInteger, Float, String, Text, bindparam, case, cast, exists, null, select, union_all, update
from sqlalchemy.orm import Session

from server.db import daemons
from server.db.among import among
from server.db.given import given
from server.db.session import Reader, one_at_a_time, rows
from server.db.tables import Run, Tenant
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


_TENANTS, _JOBS, _RUNS = (Tenant.metadata.tables[name] for name in ("tenants", "jobs", "runs"))
_QUEUED = _JOBS.alias("queued")
_NEXT = (
    select(_QUEUED.c.number)
    .where(
        _QUEUED.c.tenant_id == _TENANTS.c.id,
        _QUEUED.c.status == JobStatus.QUEUED,
        _QUEUED.c.base_hash == bindparam("base_hash"),
    )
    .order_by(_QUEUED.c.weight.desc(), _QUEUED.c.number)
    .limit(1)
    .correlate(_TENANTS)
    .scalar_subquery()
)
_ACCOUNTS = select(
    *(_TENANTS.c.id, _TENANTS.c.share, _TENANTS.c.counter, _TENANTS.c.backlogged),
    *(_RUNS.c.id.label("run_id"), _RUNS.c.counter.label("run_counter"), _JOBS.c.number),
    cast(_JOBS.c.adapter, Text).label("adapter"),
)
_NAMED = (
    _ACCOUNTS.outerjoin_from(_TENANTS, _JOBS, _JOBS.c.number == _NEXT)
    .outerjoin(_RUNS, _RUNS.c.job_id == _JOBS.c.id)
    .where(among(_TENANTS.c.id, "named"))
)
_OTHERS = (
    _ACCOUNTS.join_from(_TENANTS, _JOBS, _JOBS.c.number == _NEXT)
    .join(_RUNS, _RUNS.c.job_id == _JOBS.c.id)
    .where(~among(_TENANTS.c.id, "named"))
    .order_by(_TENANTS.c.counter, _JOBS.c.number)
    .limit(bindparam("num_others"))
    .subquery()
)
_RESIDENT = select(
    *(null(), null(), null(), null(), _RUNS.c.id, _RUNS.c.counter, null(), null()),
).where(among(_RUNS.c.id, "run_ids"))
_READ = union_all(_NAMED, select(_OTHERS), _RESIDENT)
_OF_RUNS = given("runs", id=String, rise=Float, cost=BigInteger).c
_CHARGE_RUNS = (
    update(_RUNS)
    .where(_RUNS.c.id == _OF_RUNS.id)
    .values(counter=_RUNS.c.counter + _OF_RUNS.rise, cost_charged=_RUNS.c.cost_charged + _OF_RUNS.cost)
)
_OF_TENANTS = given("tenants", id=String, rise=Float, refund=Float, trained=BigInteger).c
_CHARGE_TENANTS = (
    update(_TENANTS)
    .where(_TENANTS.c.id == _OF_TENANTS.id)
    .values(
        counter=_TENANTS.c.counter + _OF_TENANTS.rise - _OF_TENANTS.refund / _TENANTS.c.share,
        trained_tokens=_TENANTS.c.trained_tokens + _OF_TENANTS.trained,
    )
)
_BY_OTHERS = exists().where(
    _JOBS.c.id == _RUNS.c.job_id,
    _JOBS.c.status.in_(RESIDENT),
    _RUNS.c.lease_epoch != bindparam("life"),
    _RUNS.c.tenant_id == _TENANTS.c.id,
)
_NAMED_TENANT = among(_TENANTS.c.id, "named")
_IS_BACKLOGGED = update(_TENANTS).where(_TENANTS.c.backlogged.is_(False), _NAMED_TENANT).values(backlogged=True)
_IS_NOT_BACKLOGGED = (
    update(_TENANTS).where(_TENANTS.c.backlogged.is_(True), ~_NAMED_TENANT, ~_BY_OTHERS).values(backlogged=False)
)
_METER_SAMPLING = (
    update(_TENANTS)
    .where(_TENANTS.c.id == bindparam("id_"))
    .values(
        prompt_tokens=_TENANTS.c.prompt_tokens + bindparam("prompts"),
        sampled_tokens=_TENANTS.c.sampled_tokens + bindparam("sampled"),
    )
)


def read_accounts(
    reader: Reader, base_hash: str, *, named: Collection[str], num_others: int, run_ids: Collection[str] = ()
) -> tuple[list[Account], dict[str, float]]:
    """(the tenants named, and of the others with a queued job of this base those of smallest counter;
    the counter of each of these runs among its tenant's own).

    Each tenant with its next job by priority, then by submission; runs that no longer exist are left out. One
    statement, and what it reads does not grow with the queue.
    """
    wanted = {"base_hash": base_hash, "named": named, "num_others": num_others, "run_ids": run_ids}
    found, counters = [], {}
    for tenant_id, share, counter, backlogged, run_id, run_counter, *next_ in rows(reader, _READ, wanted):
        if tenant_id is None:
            counters[run_id] = run_counter
        else:
            waiting = Waiting(run_id, run_counter, *next_) if run_id else None
            found.append(Account(tenant_id, share, counter, backlogged, waiting))
    return found, counters


def charge(
    session: Session,
    *,
    rises: Mapping[str, float],
    run_rises: Mapping[str, float],
    costs: Mapping[str, int],
    refunds: Mapping[str, int],
    trained: Mapping[str, int],
) -> None:
    """Add a plan's increments to the counters, and to each run the token-equivalents that it was charged.

    `refunds` are token-equivalents to take off the counters of tenants, `trained` tokens to be metered. One daemon at a
    time: daemons share tenants, and neither the rows here nor those of `set_backlogged` have an order. Runs need none:
    who takes them from a life has its row first, which this transaction holds.
    """
    one_at_a_time(session, "accounts")
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
        connection.execute(_CHARGE_TENANTS, {"tenants": of_tenants})


def lift(session: Session, run_id: str, rise: float) -> None:
    """Raise the counter of a run that comes into memory to where its tenant's others stand."""
    if rise:
        session.connection().execute(_CHARGE_RUNS, {"runs": [{"id": run_id, "rise": rise, "cost": 0}]})


def meter_sampling(session: Session, prompts: Mapping[str, int], sampled: Mapping[str, int]) -> None:
    """Add the tokens of prompts and of answers to what tenants have used."""
    one_at_a_time(session, "accounts")
    session.execute(
        _METER_SAMPLING,
        [{"id_": id_, "prompts": prompts[id_], "sampled": sampled.get(id_, 0)} for id_ in sorted(prompts)],
    )


def give_back(session: Session, *, tenant_id: str, run_id: str, weight: int, cost: int, tokens: int) -> None:
    """Take back what was charged and metered for work that is lost.

    For a tenant that is not backlogged the credit counts from where it would be lifted to, or the lift would take it.
    """
    if not cost and not tokens:
        return
    one_at_a_time(session, "accounts")  # of several tenants, in whatever order
    session.execute(
        update(Run)
        .where(Run.id == run_id)
        .values(counter=Run.counter - cost / weight, cost_charged=Run.cost_charged - cost)
    )
    floor = daemons.floor(session)
    start = case((Tenant.backlogged | (Tenant.counter > floor), Tenant.counter), else_=floor)
    session.execute(
        update(Tenant)
        .where(Tenant.id == tenant_id)
        .values(
            counter=start - cost / Tenant.share,
            backlogged=True,
            trained_tokens=Tenant.trained_tokens - tokens,
        )
    )


def set_backlogged(session: Session, tenant_ids: frozenset[str], epoch: int) -> None:
    """Keep which tenants the last plan counted as backlogged; those whose runs others hold are theirs to say."""
    connection = session.connection()
    connection.execute(_IS_BACKLOGGED, {"named": tenant_ids})
    connection.execute(_IS_NOT_BACKLOGGED, {"named": tenant_ids, "life": epoch})
