"""What jobs have come to so far, read for several at once: the newest step, the best checkpoint, the adapter's hash."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import bindparam, func, select
from sqlalchemy.orm import aliased

from server.db.adapters import BEST_FIRST
from server.db.metrics import BY_SET, COLUMNS, column_names, flat
from server.db.session import Reader, rows
from server.db.tables import Adapter, Job, Metric


@dataclass(frozen=True, kw_only=True)
class Result:
    """None for what there is not, or not yet."""

    metrics: Mapping[str, Any] | None
    """Of the newest step: column name -> value."""
    best_checkpoint: str | None
    """The id of the adapter of lowest validation loss; of two that are equal the earlier."""
    adapter_sha256: str | None
    """Of the weights of the adapter that the job ended with."""


_STEPS, _FINAL = aliased(Metric), aliased(Adapter)
_NEWEST = select(func.max(_STEPS.step)).where(_STEPS.job_id == Job.id).scalar_subquery()
_BEST = (
    select(Adapter.id)
    .where(Adapter.job_id == Job.id, Adapter.valid_loss.is_not(None))
    .order_by(*BEST_FIRST)
    .limit(1)
    .scalar_subquery()
)
_RESULTS = (
    select(Job.id, _BEST, _FINAL.sha256, Metric.step, *COLUMNS, *BY_SET)
    .outerjoin(_FINAL, _FINAL.id == Job.adapter_id)
    .outerjoin(Metric, (Metric.job_id == Job.id) & (Metric.step == _NEWEST))
    .where(Job.id.in_(bindparam("ids", expanding=True)))
)


def read_results(reader: Reader, jobs: Sequence[Job]) -> dict[str, Result]:
    """By job."""
    by_id = {job.id: job for job in jobs}
    return {
        job_id: Result(
            metrics=None
            if step is None
            else dict(zip(column_names(by_id[job_id]), flat(by_id[job_id], row), strict=True)),
            best_checkpoint=best,
            adapter_sha256=sha256,
        )
        for job_id, best, sha256, step, *row in rows(reader, _RESULTS, {"ids": list(by_id)})
    }
