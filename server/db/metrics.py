"""Statements on metrics and experts' loads: what the daemon has written of a job's steps, read."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, func, or_, select
from sqlalchemy.orm import Session

from server.db.pages import Page, fetch_page
from server.db.tables import ExpertLoads, Job, Metric

MAX_ROWS = 10_000
COLUMNS = (
    Metric.step,
    Metric.epoch,
    Metric.tokens,
    Metric.train_loss,
    Metric.valid_loss,
    Metric.aux_loss,
    Metric.learning_rate,
    Metric.grad_norm,
    Metric.tokens_per_second,
    Metric.gang,
    Metric.gang_jobs,
    Metric.created_at,
)
COLUMN_NAMES = [column.key for column in COLUMNS]


def read_metrics(session: Session, job_id: str, *, from_step: int, every: int | None) -> tuple[list[list[Any]], int]:
    """(rows in the order of `COLUMNS`, ascending; n if only each n-th step is among them, else 1).

    `every` None takes all steps, thinned to `MAX_ROWS`. The last step and those with a validation loss are
    always there.
    """
    wanted = (Metric.job_id == job_id, Metric.step >= from_step)
    if every is None:
        count = session.scalar(select(func.count()).where(*wanted)) or 0
        every = max(1, -(-count // MAX_ROWS))
    statement = select(*COLUMNS).where(*wanted).order_by(Metric.step)
    if every > 1:
        statement = statement.where(_kept(session, wanted, every))
    return [list(row) for row in session.execute(statement)], every


def _kept(session: Session, wanted: Sequence[ColumnElement[bool]], every: int) -> ColumnElement[bool]:
    last = session.scalar(select(func.max(Metric.step)).where(*wanted))
    return or_(Metric.step % every == 0, Metric.step == last, Metric.valid_loss.is_not(None))


def list_expert_loads(session: Session, job: Job, page: Page) -> tuple[list[ExpertLoads], bool]:
    """A page of the steps whose loads are kept, and whether more follow."""
    scope = select(ExpertLoads).where(ExpertLoads.job_id == job.id)
    return fetch_page(session, scope, page, identity=ExpertLoads.step, order=(ExpertLoads.step,))


def latest_metrics(session: Session, job_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The newest row of each job that has one, by job: column name -> value."""
    newest = (
        select(Metric.job_id, func.max(Metric.step).label("step"))
        .where(Metric.job_id.in_(job_ids))
        .group_by(Metric.job_id)
        .subquery()
    )
    statement = select(Metric.job_id, *COLUMNS).join(
        newest, (Metric.job_id == newest.c.job_id) & (Metric.step == newest.c.step)
    )
    return {job_id: dict(zip(COLUMN_NAMES, row, strict=True)) for job_id, *row in session.execute(statement)}
