"""Statements on jobs that the API makes. What the daemon does to a job's run is in `server.db.runs`."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Select, bindparam, delete, func, insert, select, update
from sqlalchemy.orm import Session

from server.db import events
from server.db.pages import Listing, Page
from server.db.session import Reader, one_at_a_time, read_only
from server.db.tables import Adapter, Job, RecoveryPoint, Run
from server.errors import MixloomError, not_found
from server.ids import new_id
from server.states import ENDED, JobStatus, sources

_OF_TENANT = select(Job).where(Job.tenant_id == bindparam("tenant_id"))
_JOB = _OF_TENANT.where(Job.id == bindparam("job_id"))
_LOCKED = _JOB.with_for_update()
_JOBS = Listing(_OF_TENANT, identity=Job.id, order=(Job.number,))
_EVERY_JOB = Listing(select(Job), identity=Job.id, order=(Job.number,))
_TABLE, _RUNS = (Job.metadata.tables[name] for name in ("jobs", "runs"))
_NEXT = select(func.coalesce(func.max(_TABLE.c.number), 0) + 1).scalar_subquery()
_ADD = insert(_TABLE).values(number=_NEXT)
_ADD_RUN = insert(_RUNS)
_IS_UNFINISHED = Job.status.not_in([status.value for status in ENDED])


def add_job(session: Session, job: Mapping[str, Any], notes: Sequence[str]) -> None:
    """Put a new job, given by its columns, behind all others, with the run that will train it.

    `notes` are what its tenant should know: events of it.
    """
    one_at_a_time(session, "jobs")
    of_job = {"tenant_id": job["tenant_id"], "job_id": job["id"]}
    said = [("queued", "The job was accepted."), *(("warning", note) for note in notes)]
    connection = session.connection()  # past the ORM, which takes three times as long
    connection.execute(_ADD, job)
    connection.execute(_ADD_RUN, {**of_job, "id": new_id("run")})
    connection.execute(events.ADD, [{**of_job, **events.fields(kind, message)} for kind, message in said])


def get_job(reader: Reader, tenant_id: str, job_id: str) -> Job:
    """Raises 404 for a job that is not this tenant's."""
    found = read_only(reader, _JOB, {"tenant_id": tenant_id, "job_id": job_id})
    if not found:
        raise not_found("job", job_id)
    return found[0]


def lock_job(session: Session, tenant_id: str, job_id: str) -> Job:
    """As `get_job`; nobody else changes the job until this transaction ends."""
    job = session.scalar(_LOCKED, {"tenant_id": tenant_id, "job_id": job_id})
    if job is None:
        raise not_found("job", job_id)
    return job


def list_jobs(
    reader: Reader,
    tenant_id: str,
    page: Page,
    *,
    status: str | None = None,
    name: str | None = None,
    labels: Mapping[str, str] | None = None,
) -> tuple[list[Job], bool]:
    """A page of a tenant's jobs, and whether more follow."""
    filters = [Job.labels[key].as_string() == value for key, value in (labels or {}).items()]
    if status is not None:
        filters.append(Job.status == status)
    if name is not None:
        filters.append(Job.name == name)
    return _JOBS.page(reader, page, {"tenant_id": tenant_id}, filters)


def list_unfinished(session: Session, page: Page) -> tuple[list[Job], bool]:
    """A page of every tenant's jobs that have not ended: the operator's view."""
    return _EVERY_JOB.page(session, page, filters=[_IS_UNFINISHED])


def count_by_status(session: Session) -> dict[str, int]:
    """How many jobs of all tenants there are of each status that has any."""
    counts = session.execute(select(Job.status, func.count().label("num")).group_by(Job.status))
    return {row.status: row.num for row in counts}


def all_keys(session: Session) -> set[str]:
    """The store's keys of every job's rows."""
    return set(session.scalars(select(Job.tokens_key)))


def cancel(session: Session, job: Job) -> None:
    """End a job for good; the daemon lets go of it at its next gang boundary. Idempotent.

    Raises 400 `job_ended` when the job succeeded or failed before.
    """
    _cancel_where(session, job)
    if job.status != JobStatus.CANCELLED:
        raise _ended(job, "cancelled")


def cancel_all(session: Session, tenant_ids: Sequence[str] | Select[str]) -> None:
    """End every job of these tenants that has not ended."""
    unfinished = select(Job).where(Job.tenant_id.in_(tenant_ids), Job.status.in_(sources(JobStatus.CANCELLED)))
    for job in session.scalars(unfinished.order_by(Job.id).with_for_update()):
        _cancel_where(session, job)


def _cancel_where(session: Session, job: Job) -> None:
    if _move(session, job, sources(JobStatus.CANCELLED), status=JobStatus.CANCELLED, finished_at=time.time()):
        events.record(session, job, "cancelled", "The job was cancelled.")


def pause(session: Session, job: Job) -> None:
    """Keep a job from training: at once if it waits, else after a recovery point that the daemon makes.

    Idempotent. Raises 400 `job_ended`.
    """
    if job.status in ENDED:
        raise _ended(job, "paused")
    if _move(session, job, [JobStatus.QUEUED], status=JobStatus.PAUSED):
        events.record(session, job, "paused", "The job is paused; resume it when you like.")
    elif job.requested is None and _move(session, job, [JobStatus.PREPARING, JobStatus.RUNNING], requested="pause"):
        events.record(session, job, "pause_requested", "The job pauses as soon as its state is saved.")


def resume(session: Session, job: Job) -> None:
    """Undo a pause, or the wish for one. Idempotent. Raises 400 `job_ended`."""
    if job.status in ENDED:
        raise _ended(job, "resumed")
    if _move(session, job, [JobStatus.PAUSED], status=JobStatus.QUEUED):
        events.record(session, job, "resumed", "The job waits for its turn again.")
    elif job.requested and _move(session, job, [JobStatus.PREPARING, JobStatus.RUNNING], requested=None):
        events.record(session, job, "resumed", "The job was not paused after all.")


def _move(session: Session, job: Job, from_: list[str], **values: object) -> bool:
    """Guarded by the status in the `where`: whether the job was in one of `from_` and was changed."""
    values.setdefault("requested", None)
    if "status" in values:
        values["reason"] = None
    statement = update(Job).where(Job.id == job.id, Job.status.in_(from_)).values(**values)
    changed: int = session.execute(statement).rowcount  # type: ignore[attr-defined]
    session.refresh(job)
    return changed == 1


def delete_job(session: Session, job: Job) -> list[str]:
    """Forget an ended job and what is its; the keys to delete from the store. Raises 400 `job_not_ended`."""
    if job.status not in ENDED:
        raise MixloomError(
            "job_not_ended",
            f"Job '{job.id}' is {job.status}; only ended jobs can be deleted. Cancel it first.",
            400,
        )
    # Points by name, not their run's folder: the daemon may be writing into that until it sees the job's end.
    points = session.scalars(select(RecoveryPoint.key).join(Run).where(Run.job_id == job.id))
    adapters = session.scalars(delete(Adapter).where(Adapter.job_id == job.id).returning(Adapter.key))
    keys = [job.tokens_key, *points, *adapters]
    session.execute(delete(Job).where(Job.id == job.id))
    return keys


def _ended(job: Job, wish: str) -> MixloomError:
    return MixloomError("job_ended", f"Job '{job.id}' is {job.status} and cannot be {wish} any more.", 400)
