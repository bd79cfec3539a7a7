"""Statements on recovery points: a folder in the store counts only while a row here names it."""

from collections.abc import Sequence

from sqlalchemy import bindparam, delete, exists, select
from sqlalchemy.orm import Session

from server.db.among import is_one_of
from server.db.daemons import IS_OPEN
from server.db.session import Reader, rows
from server.db.tables import Daemon, Job, RecoveryPoint, Run
from server.states import ENDED

KEPT = 2
_OF_OTHERS = exists().where(Daemon.epoch == Run.lease_epoch, Daemon.epoch != bindparam("epoch"), IS_OPEN)
_HAS_ENDED = is_one_of(Job.metadata.tables["jobs"].c.status, ENDED)
_RUNS_ENDED = (
    select(RecoveryPoint.run_id)
    .join(Run, Run.id == RecoveryPoint.run_id)
    .join(Job, Job.id == Run.job_id)
    .where(_HAS_ENDED, ~_OF_OTHERS)
    .distinct()
)


def of_run(session: Session, run_id: str) -> Sequence[RecoveryPoint]:
    """A run's recovery points, the newest first."""
    order = (RecoveryPoint.step.desc(), RecoveryPoint.created_at.desc())
    return session.scalars(select(RecoveryPoint).where(RecoveryPoint.run_id == run_id).order_by(*order)).all()


def publish(session: Session, point: RecoveryPoint) -> list[str]:
    """Add a point and forget all but the newest two; the keys to delete from the store after the commit."""
    if session.get(Run, point.run_id) is None:  # its job was deleted while the files were written
        return [point.key]
    session.add(point)
    session.flush()
    old = of_run(session, point.run_id)[KEPT:]
    for one in old:
        session.delete(one)
    return [one.key for one in old]


def remove(session: Session, id_: str) -> None:
    """Forget one point."""
    session.execute(delete(RecoveryPoint).where(RecoveryPoint.id == id_))


def runs_ended(reader: Reader, epoch: int) -> list[str]:
    """The runs that have points although their job has ended; none that another daemon may still be saving."""
    return [row.run_id for row in rows(reader, _RUNS_ENDED, {"epoch": epoch})]


def forget(session: Session, run_ids: Sequence[str]) -> None:
    """Forget every point of these runs."""
    session.execute(delete(RecoveryPoint).where(RecoveryPoint.run_id.in_(run_ids)))


def all_keys(session: Session) -> set[str]:
    """The store's keys of every recovery point."""
    return set(session.scalars(select(RecoveryPoint.key)))


def all_runs(session: Session) -> Sequence[str]:
    """Those that have points, or may be writing their first: not those of ended jobs, which may only have had some."""
    has_points = exists().where(RecoveryPoint.run_id == Run.id)
    runs = select(Run.id).join(Job, Job.id == Run.job_id)
    return session.scalars(runs.where(has_points | ~_HAS_ENDED)).all()
