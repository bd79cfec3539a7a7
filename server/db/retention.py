"""Statements that forget what nobody is to keep any longer. Each gives the keys to delete from the store."""

import time

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from server.db import jobs
from server.db.tables import Adapter, Dataset, Job, Operation, Tenant
from server.states import ENDED

BATCH = 100
"""Jobs in one transaction."""
UNREAD_SECONDS = 3600.0


def forget_old_jobs(session: Session, ended_before: float) -> list[str]:
    """Jobs that came and ended before a moment, with all that is theirs: a clock may have been wrong at the end."""
    old = select(Job).where(Job.status.in_(ENDED), Job.finished_at < ended_before, Job.created_at < ended_before)
    found = session.scalars(old.order_by(Job.id).limit(BATCH).with_for_update()).all()
    return [key for job in found for key in jobs.delete_job(session, job)]


def forget_unread(session: Session) -> list[str]:
    """Operations that nobody waits for any more, since their deadline is long past."""
    unread = delete(Operation).where(Operation.deadline < time.time() - UNREAD_SECONDS)
    return list(session.scalars(unread.returning(Operation.key)))


def forget_deleted_tenants(session: Session) -> list[str]:
    """What tenants had that were deleted. Their jobs have been cancelled then; one that has not is now."""
    gone = select(Tenant.id).where(Tenant.deleted_at.is_not(None))
    jobs.cancel_all(session, gone)
    ended = select(Job).where(Job.tenant_id.in_(gone), Job.status.in_(ENDED))
    found = session.scalars(ended.order_by(Job.id).limit(BATCH).with_for_update()).all()
    keys = [key for job in found for key in jobs.delete_job(session, job)]
    keys += session.scalars(delete(Adapter).where(Adapter.tenant_id.in_(gone)).returning(Adapter.key))
    asked = delete(Operation).where(Operation.tenant_id.in_(gone), Operation.deadline < time.time())
    keys += session.scalars(asked.returning(Operation.key))
    datasets = session.scalars(delete(Dataset).where(Dataset.tenant_id.in_(gone)).returning(Dataset.id))
    return keys + [f"datasets/{id_}" for id_ in datasets]
