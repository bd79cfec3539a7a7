"""Statements of the daemon on jobs and their runs. Each runs inside a transaction that has checked its epoch."""

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import BigInteger, String, bindparam, delete, exists, func, insert, literal_column, select, true, update
from sqlalchemy.orm import Session

from server.db import accounts, events
from server.db.among import among, is_one_of
from server.db.given import given
from server.db.session import Reader, rows
from server.db.tables import Adapter, Event, Job, Metric, Run
from server.states import RESIDENT, JobStatus, Reason, sources

SUSPECT_CRASHES = 3
"""After so many crashes of daemons that held it a run is tried alone: see `release`."""


@dataclass(frozen=True)
class Wish:
    """What a resident run's job has become, and what its tenant wants of it."""

    status: str
    requested: str | None
    lease_epoch: int | None


def wishes(session: Session, job_ids: Iterable[str]) -> dict[str, Wish]:
    """Of the jobs that still exist."""
    return {id_: Wish(*wish) for id_, *wish in rows(session, _WISHES, {"ids": job_ids})}


def lock_job(session: Session, job_id: str) -> Job | None:
    """The job as it is, if it still exists; nobody else changes it until this transaction ends.

    Who changes more than one row takes tenants before jobs before runs, each in the order of their ids.
    """
    return session.get(Job, job_id, with_for_update=True, populate_existing=True)


def release(session: Session, epochs: Sequence[int], *, crashed: bool) -> None:
    """What lives that are over held waits again, or is paused if its tenant asked for that.

    A crash counts against every run that was resident, until it has got further than where the daemon died. Who is in
    `SUSPECT_CRASHES` of them is tried alone, and fails when the daemon dies of that.
    """
    held = select(Job, Run).join(Run, Run.job_id == Job.id).order_by(Job.id).with_for_update()
    for job, run in session.execute(held.where(Job.status.in_(RESIDENT), Run.lease_epoch.in_(epochs))):
        paused = job.requested == "pause"
        job.status = JobStatus.PAUSED if paused else JobStatus.QUEUED
        job.requested = None
        events.record(session, job, "interrupted", "The engine stopped; the job goes on from its recovery point.")
        if not crashed:
            continue
        run.crashes += 1
        run.crash_step = max(run.crash_step or 0, job.step)
        if run.crashes == SUSPECT_CRASHES:
            message = _SUSPECTED.format(count=run.crashes)
            events.record(session, job, "suspected", message, {"crashes": run.crashes, "step": run.crash_step})
        elif run.crashes > SUSPECT_CRASHES:
            message = _CRASHED.format(count=run.crashes, step=run.crash_step + 1)
            job.status, job.finished_at = JobStatus.FAILED, time.time()
            job.error = {"code": "crashed_daemon", "message": message}
            run.crashes, run.crash_step = 0, None
            events.record(session, job, "failed", message, {"code": "crashed_daemon"})


_SUSPECTED = "The engine died {count} times while this job trained beside others; now it is tried alone."
_CRASHED = (
    "The engine died {count} times while this job trained, near step {step}, the last time while nothing else did. "
    "Try fewer experts, a smaller rank or shorter rows; the operator's log says how the engine ended."
)


def suspects(reader: Reader) -> list[str]:
    """The jobs whose runs are to be tried alone. Few: in a join with them SQLite would go through the whole queue."""
    return [one.job_id for one in rows(reader, SUSPECTS)]


def next_suspect(session: Session, base_hash: str) -> str | None:
    """The first queued run on this base that is to be tried alone."""
    job_ids = suspects(session)
    if not job_ids:
        return None
    waiting = select(Run.id).join(Job, Job.id == Run.job_id).where(Job.id.in_(job_ids))
    waiting = waiting.where(Job.status == JobStatus.QUEUED, Job.base_hash == base_hash)
    return session.scalar(waiting.order_by(Job.number).limit(1))


def acquit(session: Session, run_ids: Collection[str]) -> None:
    """Forget the crashes of runs that have got further than where the daemon died."""
    if run_ids:
        session.execute(update(Run).where(Run.id.in_(run_ids)).values(crashes=0, crash_step=None))


def claim(session: Session, run_id: str, epoch: int, fingerprint: Mapping[str, Any], *, alone: bool = False) -> bool:
    """Lease a queued run and show its job as preparing; False if it is not queued, or not there, any more.

    False as well while another daemon is about to claim it, and for a suspect unless it would be `alone`.
    """
    found = rows(session, _QUEUED if alone else _QUEUED_AND_TRUSTED, {"run_id": run_id})
    if not found or not move(session, found[0].id, JobStatus.PREPARING):
        return False
    (job,), connection = found, session.connection()
    before, now = job.fingerprint or dict(fingerprint), dict(fingerprint)
    connection.execute(_LEASE, {"run_id": run_id, "epoch": epoch, "began_on": before})
    if before != now and job.exact:
        connection.execute(_IS_NOT_EXACT, {"job_id": job.id})
        message = (
            "The job goes on with other arithmetic, of this machine or version: its bits are not those of one alone."
        )
        events.record(session, job, "not_bit_exact", message, {"before": before, "now": now})
    return True


def read_run(session: Session, run_id: str) -> tuple[Job, Run] | None:
    """A run and its job; None if they do not exist any more."""
    found = session.execute(select(Job, Run).join(Run, Run.job_id == Job.id).where(Run.id == run_id)).one_or_none()
    return None if found is None else (found.Job, found.Run)


def rewind(session: Session, job: Job, run: Run, seat: int, *, step: int, tokens: int, cost_charged: int) -> None:
    """Go back to a recovery point: later metrics go, and what was charged since is given back (docs/design.md §5).

    From now on it is charged on `seat`.
    """
    connection = session.connection()
    connection.execute(_GO_BACK, {"of_job": job.id, "to_step": step, "to_tokens": tokens})
    for forget in _FORGET:
        connection.execute(forget, {"of_job": job.id, "after": step})
    lost, lost_tokens = run.cost_charged - cost_charged, job.tokens - tokens
    accounts.give_back(session, run, seat, weight=job.weight, cost=lost, tokens=lost_tokens)
    if run.seat != seat:
        connection.execute(_SIT, {"run_id": run.id, "on_seat": seat})


def move(session: Session, job_id: str, target: JobStatus, *, held_by: int | None = None, **values: object) -> bool:
    """Set a job's status where the table of transitions allows it; whether it did. `held_by`: our epoch."""
    if target is JobStatus.RUNNING:
        values.setdefault("started_at", func.coalesce(_JOBS.c.started_at, time.time()))
    statement = update(_JOBS).where(_JOBS.c.id == job_id, _JOBS.c.status.in_(sources(target)))
    if held_by is not None:
        statement = statement.where(exists().where(_RUNS.c.job_id == _JOBS.c.id, _RUNS.c.lease_epoch == held_by))
    return session.connection().execute(statement.values(status=target, **values)).rowcount == 1


@dataclass(frozen=True)
class StepRow:
    """What is recorded of one optimizer step of a job."""

    job_id: str
    metric: Mapping[str, Any]  # column -> value
    expert_loads: list[list[int]] | None


def add_steps(session: Session, steps: Sequence[StepRow], epoch: int) -> None:
    """The rows of steps, and their jobs' progress; nothing for a job that has ended, or is another daemon's by now."""
    if not steps:
        return
    connection = session.connection()
    progress = [{"id": row.job_id, "step": row.metric["step"], "tokens": row.metric["tokens"]} for row in steps]
    held = set(connection.scalars(_PROGRESS, {"jobs": progress, "epoch": epoch}))
    if not (kept := [row for row in steps if row.job_id in held]):
        return
    now = time.time()
    metrics = [{"job_id": row.job_id, "created_at": now, **row.metric} for row in kept]
    connection.execute(_ADD_METRICS, {"metrics": metrics})
    loads = [
        {"job_id": row.job_id, "step": row.metric["step"], "loads": row.expert_loads}
        for row in kept
        if row.expert_loads is not None
    ]
    if loads:
        connection.execute(_LOADS, loads)


_JOBS, _RUNS, _ADAPTERS, _METRICS, _EXPERT_LOADS = (
    Job.metadata.tables[name] for name in ("jobs", "runs", "adapters", "metrics", "expert_loads")
)
_QUEUED = (
    select(*_JOBS.c["id", "tenant_id", "exact"], _RUNS.c.fingerprint)
    .join(_RUNS, _RUNS.c.job_id == _JOBS.c.id)
    .where(_RUNS.c.id == bindparam("run_id"), _JOBS.c.status == JobStatus.QUEUED)
    .with_for_update(skip_locked=True)
)
_QUEUED_AND_TRUSTED = _QUEUED.where(_RUNS.c.crashes < SUSPECT_CRASHES)
_LEASE = (
    update(_RUNS)
    .where(_RUNS.c.id == bindparam("run_id"))
    .values(lease_epoch=bindparam("epoch"), attempts=_RUNS.c.attempts + 1, fingerprint=bindparam("began_on"))
)
_SIT = update(_RUNS).where(_RUNS.c.id == bindparam("run_id")).values(seat=bindparam("on_seat"))
_IS_NOT_EXACT = update(_JOBS).where(_JOBS.c.id == bindparam("job_id")).values(exact=False)
_GO_BACK = (
    update(_JOBS)
    .where(_JOBS.c.id == bindparam("of_job"))
    .values(step=bindparam("to_step"), tokens=bindparam("to_tokens"))
)
_FORGET = [
    delete(table).where(table.c.job_id == bindparam("of_job"), table.c.step > bindparam("after"))
    for table in (_METRICS, _EXPERT_LOADS)
]
_OF_STEPS = given(
    "metrics",
    **{column.name: type(column.type) for column in _METRICS.c if column.name not in ("valid_loss", "valid_losses")},
).c
_ADD_METRICS = insert(_METRICS).from_select(_OF_STEPS.keys(), select(*_OF_STEPS))
_LOADS = insert(_EXPERT_LOADS)
_WISHES = (
    select(_JOBS.c.id, _JOBS.c.status, _JOBS.c.requested, _RUNS.c.lease_epoch)
    .join(_RUNS, _RUNS.c.job_id == _JOBS.c.id)
    .where(among(_JOBS.c.id, "ids"))
)
SUSPECTS = select(_RUNS.c.job_id).where(_RUNS.c.crashes >= literal_column(str(SUSPECT_CRASHES)))  # see `is_one_of`
_LOCKED = _JOBS.alias("locked")
_HELD = (
    select(_LOCKED.c.id)
    .join(_RUNS, _RUNS.c.job_id == _LOCKED.c.id)
    .where(is_one_of(_LOCKED.c.status, RESIDENT), _RUNS.c.lease_epoch == bindparam("epoch"))
    .order_by(_LOCKED.c.id)
    .with_for_update(of=_LOCKED)
)
_STILL_HELD = _HELD.where(among(_LOCKED.c.id, "ids"))
_OF_JOBS = given("jobs", id=String, step=BigInteger, tokens=BigInteger).c
_STEPPED = _HELD.add_columns(_OF_JOBS.step, _OF_JOBS.tokens).where(_LOCKED.c.id == _OF_JOBS.id).subquery()
_PROGRESS = (
    update(_JOBS)
    .where(_JOBS.c.id == _STEPPED.c.id)
    .values(step=_STEPPED.c.step, tokens=_STEPPED.c.tokens)
    .returning(_JOBS.c.id)
)


def add_evaluation(
    session: Session, job: Job, epoch: int, *, step: int, valid_loss: float, valid_losses: list[float | None] | None
) -> None:
    """Into its step's row, and an event; nothing for a job that has ended, or is another daemon's by now.

    An evaluation that is repeated, since its job went back to a recovery point, was told of before.
    """
    if not session.scalars(_STILL_HELD, {"ids": [job.id], "epoch": epoch}).all():
        return
    row = update(Metric).where(Metric.job_id == job.id, Metric.step == step)
    session.execute(row.values(valid_loss=valid_loss, valid_losses=valid_losses))
    told = select(Event.id).where(Event.job_id == job.id, Event.kind == "evaluated")
    if session.scalar(told.where(Event.data["step"].as_integer() == step)) is not None:
        return
    by_set = zip(job.mixture or (), valid_losses, strict=True) if valid_losses else ()
    measured = [(part, loss) for part, loss in by_set if loss is not None]
    each = ", ".join(f"{part['name']} {loss:.4f}" for part, loss in measured)
    message = f"Validation loss {valid_loss:.4f} after step {step}" + (f" ({each})." if each else ".")
    data = {"step": step, "valid_loss": valid_loss, **{f"valid_loss.{part['id']}": loss for part, loss in measured}}
    events.record(session, job, "evaluated", message, data)


def add_adapter(session: Session, adapter: Mapping[str, Any], *, keep: int) -> list[str]:
    """Publish an adapter of a job, given by its columns, and forget the checkpoints beyond the newest `keep`.

    The best one by validation loss and a final adapter stay. The keys to delete from the store after the commit: the
    new one's is among them if the job has one of its step already (it was rewound, and that one stays).
    """
    connection = session.connection()
    old = [dict(one) for one in connection.execute(_MADE, {"of_job": adapter["job_id"]}).mappings()]
    if any(one["step"] == adapter["step"] for one in old):
        return [adapter["key"]]
    connection.execute(_ADD_ADAPTER, adapter)
    made: list[Mapping[str, Any]] = sorted([adapter, *old], key=lambda one: one["step"], reverse=True)
    scored = [one for one in made if one["valid_loss"] is not None]
    best = min(scored, key=lambda one: (one["valid_loss"], one["step"]), default=None)
    surplus = [one for one in made[keep:] if one is not best and not one["final"]]
    if surplus:
        connection.execute(_FORGET_ADAPTERS, {"ids": [one["id"] for one in surplus]})
    return [one["key"] for one in surplus]


_MADE = select(*_ADAPTERS.c["id", "step", "key", "valid_loss", "final"]).where(
    _ADAPTERS.c.job_id == bindparam("of_job")
)
_ADD_ADAPTER = insert(_ADAPTERS)
_FORGET_ADAPTERS = delete(_ADAPTERS).where(among(_ADAPTERS.c.id, "ids"))


def adapters_of(session: Session, job_id: str) -> Sequence[Adapter]:
    """The adapters that a job has made so far."""
    return session.scalars(select(Adapter).where(Adapter.job_id == job_id)).all()


def adapter_key(session: Session, adapter_id: str) -> str | None:
    """Where the store has an adapter's files; None if it was deleted."""
    return session.scalar(select(Adapter.key).where(Adapter.id == adapter_id))


def lock_queued_job(session: Session, run_id: str) -> Job | None:
    """The job of a run, which nobody can claim before this transaction ends; None if it does not wait any more."""
    waiting = select(Job).join(Run, Run.job_id == Job.id).where(Run.id == run_id, Job.status == JobStatus.QUEUED)
    return session.scalar(waiting.with_for_update(of=Job))


def queued(reader: Reader, run_ids: Collection[str]) -> dict[str, bool]:
    """Those of these runs whose jobs wait, and whether they were in memory before."""
    return {row.id: row.started_at is not None for row in rows(reader, _WAITING, {"ids": run_ids})}


def tell_short_of_bytes(
    session: Session, base_hash: str, run_ids: Collection[str], *, before: Collection[str] | None
) -> None:
    """Note that these runs wait for memory, and those of `before` no longer. None: no others of this base."""
    jobs = select(Run.job_id).where(Run.id.in_(run_ids))
    others = true() if before is None else Job.id.in_(select(Run.job_id).where(Run.id.in_(before)))
    here = update(Job).where(Job.base_hash == base_hash).execution_options(synchronize_session=False)
    session.execute(here.where(Job.reason == Reason.MEMORY, others, Job.id.not_in(jobs)).values(reason=None))
    session.execute(here.where(Job.status == JobStatus.QUEUED, Job.id.in_(jobs)).values(reason=Reason.MEMORY))


def is_told_short_of_bytes(reader: Reader, run_ids: Collection[str]) -> bool:
    """Whether it is noted of each of these that it waits for memory."""
    return len(rows(reader, _SHORT, {"ids": run_ids})) == len(run_ids)


_WAITING = (
    select(_RUNS.c.id, _JOBS.c.started_at)
    .join(_JOBS, _JOBS.c.id == _RUNS.c.job_id)
    .where(among(_RUNS.c.id, "ids"), _JOBS.c.status == JobStatus.QUEUED)
)
_SHORT = (
    select(_RUNS.c.id)
    .join(_JOBS, _JOBS.c.id == _RUNS.c.job_id)
    .where(among(_RUNS.c.id, "ids"), _JOBS.c.reason == Reason.MEMORY)
)
