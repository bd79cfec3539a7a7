"""What does not fit together: rows against files, rows against rows. Reads only; `mixloom admin doctor` prints it."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from server.adapter_files import CONFIG, WEIGHTS
from server.db.daemons import live_daemons
from server.db.session import Database
from server.db.tables import Adapter, Base, Dataset, Job, Metric, Operation, RecoveryPoint, Run
from server.ingest.file import CONTENT_FILE, ROWS_FILE
from server.orphans import SAFE_SECONDS, orphans
from server.states import ENDED, RESIDENT
from server.store import LocalStore, is_whole, sha256_of

Kind = Literal[
    "adapter_damaged",
    "adapter_missing",
    "adapter_row_missing",
    "database_damaged",
    "dataset_damaged",
    "dataset_missing",
    "metrics_gap",
    "no_live_lease",
    "orphan",
    "recovery_point_damaged",
    "recovery_point_missing",
    "recovery_point_of_ended_job",
    "request_missing",
    "row_without_parent",
    "run_missing",
    "tokenizer_missing",
    "tokens_damaged",
    "tokens_missing",
]
"""Stable words for programs."""


@dataclass(frozen=True, order=True)
class Finding:
    """One thing that is not as it must be."""

    kind: Kind
    id: str
    """Of the row, or the key of the folder."""
    message: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(database: Database, store: LocalStore) -> list[Finding]:
    """Everything that is wrong; each file that a row has a hash of is read.

    The server may be at work meanwhile: what a second look does not find was only being changed.
    """
    found = _look(database, store)
    if found:
        time.sleep(1)
        again = set(_look(database, store))
        found = [finding for finding in found if finding in again]
    return found


def examine_files(database: Database, store: LocalStore) -> list[Finding]:
    """Of that what concerns the files that rows name, at first sight."""
    checks = (_adapters, _recovery_points, _datasets, _tokens, _bases, _operations)
    with database.read() as session:
        return sorted(finding for check in checks for finding in check(session, store))


def _look(database: Database, store: LocalStore) -> list[Finding]:
    with database.read() as session:
        rows = [finding for check in (_database, _leases, _jobs, _metrics) for finding in check(session)]
        lost = orphans(session, store)
    message = "No row names this folder. The daemon that lives erases it within ten minutes."
    return sorted([*rows, *examine_files(database, store), *(Finding("orphan", key, message) for key in lost)])


def _adapters(session: Session, store: LocalStore) -> Iterator[Finding]:
    for adapter in session.scalars(select(Adapter)):
        folder = store.path(adapter.key)
        if not (folder / WEIGHTS).is_file() or not (folder / CONFIG).is_file():
            yield Finding("adapter_missing", adapter.id, f"Its files are not in {adapter.key}. {_RESTORE}")
        elif sha256_of(folder / WEIGHTS) != adapter.sha256:
            yield Finding("adapter_damaged", adapter.id, f"{adapter.key}/{WEIGHTS} has another hash. {_RESTORE}")


def _recovery_points(session: Session, store: LocalStore) -> Iterator[Finding]:
    for point in session.scalars(select(RecoveryPoint)):
        if not is_whole(store.path(point.key), point.manifest):
            kind: Kind = "recovery_point_damaged" if store.path(point.key).is_dir() else "recovery_point_missing"
            yield Finding(
                kind, point.id, f"{point.key} is not what was written. Its run takes the point before it, if any."
            )


def _datasets(session: Session, store: LocalStore) -> Iterator[Finding]:
    for dataset in session.scalars(select(Dataset)):
        folder = store.path(f"datasets/{dataset.id}")
        if not (folder / CONTENT_FILE).is_file() or not (folder / ROWS_FILE).is_file():
            yield Finding("dataset_missing", dataset.id, f"Its files are not there. {_RESTORE}")
        elif sha256_of(folder / CONTENT_FILE) != dataset.sha256:
            yield Finding("dataset_damaged", dataset.id, f"Its content has another hash. {_RESTORE}")


def _tokens(session: Session, store: LocalStore) -> Iterator[Finding]:
    for job in session.scalars(select(Job)):
        folder = store.path(job.tokens_key)
        if not (folder / "train.safetensors").is_file():
            yield Finding("tokens_missing", job.id, f"Its own rows are not in {job.tokens_key}. {_RESTORE}")
        elif job.tokens_manifest is not None and not is_whole(folder, job.tokens_manifest):
            yield Finding("tokens_damaged", job.id, f"{job.tokens_key} is not what was written. {_RESTORE}")


def _bases(session: Session, store: LocalStore) -> Iterator[Finding]:
    for base in session.scalars(select(Base)):
        if not store.path(base.folder_key).is_dir():
            message = "Its tokenizer is not there. A daemon that serves it writes it again at its start."
            yield Finding("tokenizer_missing", base.hash, message)


def _operations(session: Session, store: LocalStore) -> Iterator[Finding]:
    for operation in session.scalars(select(Operation)):
        if not store.path(operation.key).is_dir():
            yield Finding("request_missing", operation.id, "Its files are not there; it goes an hour after its time.")


def _database(session: Session) -> Iterator[Finding]:
    """SQLite's own word on its file. PostgreSQL keeps checksums of its own."""
    if session.get_bind().dialect.name != "sqlite":
        return
    for (said,) in session.execute(text("PRAGMA integrity_check")):
        if said != "ok":
            yield Finding("database_damaged", "mixloom.db", f"SQLite says: {said}. {_RESTORE}")
    for table, row, parent, _ in session.execute(text("PRAGMA foreign_key_check")):
        yield Finding("row_without_parent", f"{table} {row}", f"The row of {parent} that it belongs to is not there.")


def _leases(session: Session) -> Iterator[Finding]:
    """Who trains is leased by a daemon that lives."""
    epochs = {daemon.epoch for daemon in live_daemons(session)}
    held = select(Job.id, Run.lease_epoch).join(Run, Run.job_id == Job.id).where(Job.status.in_(RESIDENT))
    for job_id, lease_epoch in session.execute(held):
        if lease_epoch not in epochs:
            message = "It is shown as training and no live daemon has it. The next daemon to start takes it up."
            yield Finding("no_live_lease", job_id, message)


def _jobs(session: Session) -> Iterator[Finding]:
    """What a job's row says of other rows."""
    without = select(Job.id).where(Job.id.not_in(select(Run.job_id)))
    for job_id in session.scalars(without):
        yield Finding("run_missing", job_id, f"It has no run, so it can never train. {_RESTORE}")
    lost = select(Job.id).where(Job.adapter_id.is_not(None), Job.adapter_id.not_in(select(Adapter.id)))
    for job_id in session.scalars(lost):
        yield Finding("adapter_row_missing", job_id, f"The adapter that it names is not there. {_RESTORE}")
    long_ago = time.time() - SAFE_SECONDS
    ended = select(RecoveryPoint.id).join(Run, Run.id == RecoveryPoint.run_id).join(Job, Job.id == Run.job_id)
    for id_ in session.scalars(ended.where(Job.status.in_(ENDED), Job.finished_at < long_ago)):
        yield Finding("recovery_point_of_ended_job", id_, "The daemon was to erase it when its job ended.")


def _metrics(session: Session) -> Iterator[Finding]:
    """Every step of a job is in its metrics once, up to the step that its row says."""
    count = func.count(Metric.step)
    counted = (
        select(Job.id, Job.step, count, func.coalesce(func.max(Metric.step), 0))
        .outerjoin(Metric, Metric.job_id == Job.id)
        .group_by(Job.id, Job.step)
        .having((count != Job.step) | (func.coalesce(func.max(Metric.step), 0) != Job.step))
    )
    for job_id, step, num, last in session.execute(counted):
        yield Finding("metrics_gap", job_id, f"Its row says {step} steps; its metrics hold {num}, the last is {last}.")


_RESTORE = "Restore it from a backup, or delete it."
