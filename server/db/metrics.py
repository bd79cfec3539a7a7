"""Statements on metrics and experts' loads: what the daemon has written of a job's steps, read."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, bindparam, func, or_, select
from sqlalchemy.orm import Session

from server.db.pages import Listing, Page
from server.db.session import Reader, rows
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
BY_SET = (Metric.train_losses, Metric.valid_losses)
_WANTED = (Metric.job_id == bindparam("job_id"), Metric.step >= bindparam("from_step"))
_ROWS = select(*COLUMNS, *BY_SET).where(*_WANTED).order_by(Metric.step)
_COUNT = select(func.count()).where(*_WANTED)
_LAST = select(func.max(Metric.step)).where(*_WANTED)
_LOADS = Listing(
    select(ExpertLoads).where(ExpertLoads.job_id == bindparam("job_id")),
    identity=ExpertLoads.step,
    order=(ExpertLoads.step,),
)


def column_names(job: Job) -> list[str]:
    """Of a job's metrics: those of every job, then of a mixture the losses of each data set, `train_loss.ID`."""
    return [*COLUMN_NAMES, *(f"{loss}.{part['id']}" for loss in _losses_by_set(job) for part in job.mixture or ())]


def _losses_by_set(job: Job) -> list[str]:
    """Those measured of each data set: the validation loss only where rows of each are held out."""
    held_out = any(part["validation_rows"] for part in job.mixture or ())
    return ["train_loss", "valid_loss"] if held_out else ["train_loss"]


def flat(job: Job, values: Sequence[Any]) -> list[Any]:
    """A row of `COLUMNS` and `BY_SET` in the order of `column_names`."""
    *row, train_losses, valid_losses = values
    by_set = {"train_loss": train_losses, "valid_loss": valid_losses}
    unknown = [None] * len(job.mixture or ())
    return [*row, *(loss for name in _losses_by_set(job) for loss in by_set[name] or unknown)]


def read_metrics(reader: Reader, job: Job, *, from_step: int, every: int | None) -> tuple[list[list[Any]], int]:
    """(rows in the order of `column_names`, ascending; n if only each n-th step is among them, else 1).

    `every` None takes all steps, thinned to `MAX_ROWS`. The last step and those with a validation loss are
    always there.
    """
    wanted = {"job_id": job.id, "from_step": from_step}
    if every is None:
        may_be_many = job.total_steps - from_step >= MAX_ROWS
        count = (reader.scalar(_COUNT, wanted) or 0) if may_be_many else 0
        every = max(1, -(-count // MAX_ROWS))
    statement = _ROWS if every == 1 else _ROWS.where(_is_kept(every, reader.scalar(_LAST, wanted)))
    return [flat(job, row) for row in rows(reader, statement, wanted)], every


def _is_kept(every: int, last: int | None) -> ColumnElement[bool]:
    return or_(Metric.step % every == 0, Metric.step == last, Metric.valid_loss.is_not(None))


def list_expert_loads(session: Session, job: Job, page: Page) -> tuple[list[ExpertLoads], bool]:
    """A page of the steps whose loads are kept, and whether more follow."""
    return _LOADS.page(session, page, {"job_id": job.id})
