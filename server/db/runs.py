"""Statements of the daemon on jobs and their runs. Each runs inside a transaction that has checked its epoch."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from server.db import events
from server.db.tables import Adapter, ExpertLoads, Job, Metric, Run, Tenant
from server.states import JobStatus, sources

RESIDENT = (JobStatus.PREPARING, JobStatus.RUNNING)


@dataclass(frozen=True)
class Waiting:
    """A tenant's next job to become resident."""

    run_id: str
    tenant_id: str
    counter: float
    order: int


def next_waiting(session: Session, base_hash: str) -> list[Waiting]:
    """Of each tenant the queued job of this base that is next: by priority, then by submission."""
    rank = func.row_number().over(partition_by=Job.tenant_id, order_by=(Job.weight.desc(), Job.number))
    queued = (
        select(Job.id, rank.label("place")).where(Job.status == JobStatus.QUEUED, Job.base_hash == base_hash).subquery()
    )
    statement = (
        select(Run.id, Run.tenant_id, Run.counter, Job.number)
        .join(Job, Job.id == Run.job_id)
        .join(queued, queued.c.id == Job.id)
        .where(queued.c.place == 1)
    )
    return [Waiting(*row) for row in session.execute(statement)]


def tenants_of(session: Session, ids: Iterable[str]) -> dict[str, Tenant]:
    """The tenants with these ids."""
    return {tenant.id: tenant for tenant in session.scalars(select(Tenant).where(Tenant.id.in_(list(ids))))}


def wishes(session: Session, job_ids: Iterable[str]) -> dict[str, tuple[str, str | None]]:
    """(status, requested) of the jobs that still exist."""
    statement = select(Job.id, Job.status, Job.requested).where(Job.id.in_(list(job_ids)))
    return {id_: (status, requested) for id_, status, requested in session.execute(statement)}


def lock_job(session: Session, job_id: str) -> Job | None:
    """The job as it is, if it still exists; nobody else changes it until this transaction ends.

    Who changes more than one row takes jobs before runs before tenants, each in the order of their ids.
    """
    return session.get(Job, job_id, with_for_update=True, populate_existing=True)


def counters(session: Session, run_ids: Iterable[str]) -> dict[str, float]:
    """The counter of each run among its tenant's own."""
    statement = select(Run.id, Run.counter).where(Run.id.in_(list(run_ids)))
    return {row.id: row.counter for row in session.execute(statement)}


def release_all(session: Session) -> None:
    """At a daemon's start: what an earlier one held waits again, or is paused if its tenant asked for that."""
    held = session.scalars(select(Job).where(Job.status.in_(RESIDENT))).all()
    for job in held:
        paused = job.requested == "pause"
        job.status = JobStatus.PAUSED if paused else JobStatus.QUEUED
        job.requested = None
        events.record(session, job, "interrupted", "The engine stopped; the job goes on from its recovery point.")


def claim(session: Session, run_id: str, epoch: int, fingerprint: Mapping[str, Any]) -> tuple[Job, Run] | None:
    """Lease a queued run and show its job as preparing; None if it is not queued, or not there, any more."""
    job_id = session.scalar(select(Run.job_id).where(Run.id == run_id))
    if job_id is None or not move(session, job_id, JobStatus.PREPARING):
        return None
    run = session.get_one(Run, run_id)
    run.lease_epoch = epoch
    run.attempts += 1
    job = session.get_one(Job, job_id, populate_existing=True)
    if run.fingerprint is None:
        run.fingerprint = dict(fingerprint)
    elif run.fingerprint != dict(fingerprint) and job.exact:
        job.exact = False
        message = "The job goes on on a machine whose arithmetic differs: its bits are not those of one machine."
        events.record(session, job, "not_bit_exact", message, {"before": run.fingerprint, "now": dict(fingerprint)})
    return job, run


def rewind(session: Session, job: Job, run: Run, *, step: int, tokens: int, cost_charged: int) -> None:
    """Go back to a recovery point: later metrics go, and what was charged since is given back (docs/design.md §5)."""
    session.execute(delete(Metric).where(Metric.job_id == job.id, Metric.step > step))
    session.execute(delete(ExpertLoads).where(ExpertLoads.job_id == job.id, ExpertLoads.step > step))
    lost = run.cost_charged - cost_charged
    session.execute(update(Job).where(Job.id == job.id).values(step=step, tokens=tokens))
    share = select(Tenant.share).where(Tenant.id == run.tenant_id).scalar_subquery()
    session.execute(
        update(Run).where(Run.id == run.id).values(cost_charged=cost_charged, counter=Run.counter - lost / job.weight)
    )
    session.execute(update(Tenant).where(Tenant.id == run.tenant_id).values(counter=Tenant.counter - lost / share))


def move(session: Session, job_id: str, target: JobStatus, **values: object) -> bool:
    """Set a job's status where the table of transitions allows it; whether it did."""
    if target is JobStatus.RUNNING:
        values.setdefault("started_at", func.coalesce(Job.started_at, time.time()))
    statement = (
        update(Job)
        .where(Job.id == job_id, Job.status.in_(sources(target)))
        .values(status=target, **values)
        .execution_options(synchronize_session=False)
    )
    changed: int = session.execute(statement).rowcount  # type: ignore[attr-defined]
    return changed == 1


def add_charges(
    session: Session,
    *,
    lifts: Mapping[str, float] = MappingProxyType({}),
    charges: Mapping[str, float] = MappingProxyType({}),
    run_lifts: Mapping[str, float] = MappingProxyType({}),
    run_charges: Mapping[str, float] = MappingProxyType({}),
    costs: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Write a plan's increments; `costs` are the token-equivalents charged to each run."""
    for run_id in sorted(run_lifts.keys() | run_charges.keys() | costs.keys()):
        rise = run_lifts.get(run_id, 0.0) + run_charges.get(run_id, 0.0)
        cost = Run.cost_charged + costs.get(run_id, 0)
        session.execute(update(Run).where(Run.id == run_id).values(counter=Run.counter + rise, cost_charged=cost))
    for tenant_id in sorted(lifts.keys() | charges.keys()):
        rise = lifts.get(tenant_id, 0.0) + charges.get(tenant_id, 0.0)
        session.execute(update(Tenant).where(Tenant.id == tenant_id).values(counter=Tenant.counter + rise))


def set_backlogged(session: Session, tenant_ids: frozenset[str]) -> None:
    """Keep which tenants the last plan counted as backlogged."""
    for flag, changed in ((True, Tenant.id.in_(tenant_ids)), (False, Tenant.id.not_in(tenant_ids))):
        session.execute(update(Tenant).where(Tenant.backlogged.is_(not flag), changed).values(backlogged=flag))


def add_metric(
    session: Session, job_id: str, values: Mapping[str, Any], expert_loads: list[list[int]] | None = None
) -> None:
    """A step's row, and the job's progress with it; nothing for a job that has been ended meanwhile."""
    progress = {"step": values["step"], "tokens": values["tokens"]}
    statement = update(Job).where(Job.id == job_id, Job.status.in_(RESIDENT)).values(**progress)
    if session.execute(statement).rowcount:  # type: ignore[attr-defined]
        session.add(Metric(job_id=job_id, created_at=time.time(), **values))
        if expert_loads is not None:
            session.add(ExpertLoads(job_id=job_id, step=values["step"], loads=expert_loads))


def set_valid_loss(session: Session, job_id: str, step: int, valid_loss: float) -> None:
    session.execute(update(Metric).where(Metric.job_id == job_id, Metric.step == step).values(valid_loss=valid_loss))


def add_adapter(session: Session, adapter: Adapter) -> bool:
    """Publish an adapter; False if its job has one of this step already (it was rewound, and that one stays)."""
    same = select(Adapter.id).where(Adapter.job_id == adapter.job_id, Adapter.step == adapter.step)
    if session.scalar(same) is not None:
        return False
    session.add(adapter)
    return True


def surplus_checkpoints(session: Session, job_id: str, keep: int) -> list[Adapter]:
    """Checkpoints beyond the newest `keep`; the best one by validation loss and a final adapter stay."""
    rows: Sequence[Adapter] = session.scalars(
        select(Adapter).where(Adapter.job_id == job_id).order_by(Adapter.step.desc())
    ).all()
    scored = [row for row in rows if row.valid_loss is not None]
    best = min(scored, key=lambda row: (row.valid_loss or 0.0, row.step), default=None)
    return [row for row in rows[keep:] if row is not best and not row.final]


def all_adapter_keys(session: Session) -> set[str]:
    """The store's keys of every adapter."""
    return set(session.scalars(select(Adapter.key)))
