"""Statements on recovery points: a folder in the store counts only while a row here names it."""

import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from server.db.tables import Job, RecoveryPoint, Run
from server.ids import new_id
from server.states import ENDED

KEPT = 2


def of_run(session: Session, run_id: str) -> Sequence[RecoveryPoint]:
    """A run's recovery points, the newest first."""
    order = (RecoveryPoint.step.desc(), RecoveryPoint.created_at.desc())
    return session.scalars(select(RecoveryPoint).where(RecoveryPoint.run_id == run_id).order_by(*order)).all()


def publish(
    session: Session,
    *,
    run_id: str,
    epoch: int,
    step: int,
    cursor: dict[str, Any],
    cost_charged: int,
    key: str,
    manifest: dict[str, Any],
) -> list[str]:
    """Add a point and forget all but the newest two; the keys to delete from the store after the commit."""
    if session.get(Run, run_id) is None:  # its job was deleted while the files were written
        return [key]
    session.add(
        RecoveryPoint(
            id=new_id("rec"),
            run_id=run_id,
            epoch=epoch,
            step=step,
            cursor=cursor,
            cost_charged=cost_charged,
            key=key,
            manifest=manifest,
            created_at=time.time(),
        )
    )
    session.flush()
    old = of_run(session, run_id)[KEPT:]
    for point in old:
        session.delete(point)
    return [point.key for point in old]


def remove(session: Session, id_: str) -> None:
    """Forget one point."""
    session.execute(delete(RecoveryPoint).where(RecoveryPoint.id == id_))


def runs_ended(session: Session) -> list[str]:
    """The runs that have points although their job has ended."""
    statement = select(RecoveryPoint.run_id).join(Run, Run.id == RecoveryPoint.run_id).join(Job, Job.id == Run.job_id)
    return list(session.scalars(statement.where(Job.status.in_(ENDED)).distinct()))


def forget(session: Session, run_ids: Sequence[str]) -> None:
    """Forget every point of these runs."""
    session.execute(delete(RecoveryPoint).where(RecoveryPoint.run_id.in_(run_ids)))


def all_keys(session: Session) -> set[str]:
    """The store's keys of every recovery point."""
    return set(session.scalars(select(RecoveryPoint.key)))
