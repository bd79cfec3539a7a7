"""Statements on accounts: what the scheduler decides from, and what its plans add to and never overwrite."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from sqlalchemy import bindparam, case, select, update
from sqlalchemy.orm import Session

from server.db.tables import Daemon, Job, Run, Tenant
from server.states import JobStatus


@dataclass(frozen=True)
class Waiting:
    """A tenant's next job to become resident."""

    run_id: str
    counter: float
    order: int


@dataclass(frozen=True)
class Account:
    """A tenant as the scheduler sees it."""

    tenant_id: str
    share: float
    counter: float
    backlogged: bool
    next: Waiting | None


_NEXT = (
    select(Job.number)
    .where(Job.tenant_id == Tenant.id, Job.status == JobStatus.QUEUED, Job.base_hash == bindparam("base_hash"))
    .order_by(Job.weight.desc(), Job.number)
    .limit(1)
    .correlate(Tenant)
    .scalar_subquery()
)
_TENANTS = select(Tenant.id, Tenant.share, Tenant.counter, Tenant.backlogged, _NEXT.label("next"))
_NAMED = _TENANTS.where(Tenant.id.in_(bindparam("named", expanding=True)))
_OTHERS = (
    _TENANTS.where(Tenant.id.not_in(bindparam("named", expanding=True)), _NEXT.is_not(None))
    .order_by(Tenant.counter, _NEXT)
    .limit(bindparam("num_others"))
)
_RUNS = (
    select(Job.number, Run.id, Run.counter)
    .join(Run, Run.job_id == Job.id)
    .where(Job.number.in_(bindparam("numbers", expanding=True)))
)


def read_accounts(session: Session, base_hash: str, *, named: Collection[str], num_others: int) -> list[Account]:
    """The tenants named, and of the others with a queued job of this base those of smallest counter.

    Each with its next job by priority, then by submission. What is read does not grow with the queue.
    """
    values = {"base_hash": base_hash, "named": list(named)}
    rows = [*session.execute(_NAMED, values), *session.execute(_OTHERS, {**values, "num_others": num_others})]
    numbers = [row.next for row in rows if row.next is not None]
    runs = session.execute(_RUNS, {"numbers": numbers})
    waiting = {number: Waiting(run_id, counter, number) for number, run_id, counter in runs}
    return [Account(row.id, row.share, row.counter, row.backlogged, waiting.get(row.next)) for row in rows]


def run_counters(session: Session, run_ids: Iterable[str]) -> dict[str, float]:
    """The counter of each run among its tenant's own; those that no longer exist are left out."""
    statement = select(Run.id, Run.counter).where(Run.id.in_(list(run_ids)))
    return {row.id: row.counter for row in session.execute(statement)}


def charge(
    session: Session,
    *,
    rises: Mapping[str, float],
    run_rises: Mapping[str, float],
    costs: Mapping[str, int],
    refunds: Mapping[str, int],
) -> None:
    """Add a plan's increments to the counters, and to each run the token-equivalents that it was charged.

    `refunds` are token-equivalents to take off the counters of tenants.
    """
    if run_ids := run_rises.keys() | costs.keys():
        session.execute(
            update(Run.__table__)  # type: ignore[arg-type]
            .where(Run.id == bindparam("id_"))
            .values(counter=Run.counter + bindparam("rise"), cost_charged=Run.cost_charged + bindparam("cost")),
            [{"id_": id_, "rise": run_rises.get(id_, 0.0), "cost": costs.get(id_, 0)} for id_ in sorted(run_ids)],
        )
    if tenant_ids := rises.keys() | refunds.keys():
        session.execute(
            update(Tenant.__table__)  # type: ignore[arg-type]
            .where(Tenant.id == bindparam("id_"))
            .values(counter=Tenant.counter + bindparam("rise") - bindparam("refund") / Tenant.share),
            [{"id_": id_, "rise": rises.get(id_, 0.0), "refund": refunds.get(id_, 0)} for id_ in sorted(tenant_ids)],
        )


def give_back(session: Session, *, tenant_id: str, run_id: str, weight: int, cost: int) -> None:
    """Take back what was charged for work that is lost.

    For a tenant that is not backlogged the credit counts from where it would be lifted to, or the lift would take it.
    """
    if not cost:
        return
    session.execute(
        update(Run)
        .where(Run.id == run_id)
        .values(counter=Run.counter - cost / weight, cost_charged=Run.cost_charged - cost)
    )
    floor = select(Daemon.floor).order_by(Daemon.epoch.desc()).limit(1).scalar_subquery()
    start = case((Tenant.backlogged | (Tenant.counter > floor), Tenant.counter), else_=floor)
    session.execute(
        update(Tenant).where(Tenant.id == tenant_id).values(counter=start - cost / Tenant.share, backlogged=True)
    )


def set_backlogged(session: Session, tenant_ids: frozenset[str]) -> None:
    """Keep which tenants the last plan counted as backlogged."""
    for flag, changed in ((True, Tenant.id.in_(tenant_ids)), (False, Tenant.id.not_in(tenant_ids))):
        session.execute(update(Tenant).where(Tenant.backlogged.is_(not flag), changed).values(backlogged=flag))
