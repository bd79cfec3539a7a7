"""What does not fit together: rows against files, rows against rows. Reads only; `mixloom admin doctor` prints it."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from sqlalchemy import JSON, exists, func, select, text
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session

from server.adapter_files import CONFIG, WEIGHTS
from server.db.daemons import live_daemons
from server.db.migrate import open_current
from server.db.session import Database, is_damaged
from server.db.tables import Adapter, Base, Daemon, Dataset, Job, Metric, Operation, RecoveryPoint, Run, Table
from server.errors import MixloomError
from server.ingest.file import CONTENT_FILE, ROWS_FILE
from server.orphans import SAFE_SECONDS, orphans
from server.settings import Settings
from server.states import ENDED, RESIDENT
from server.store import LocalStore, Manifest, is_whole, sha256_of

Kind = Literal[
    "adapter_damaged",
    "adapter_missing",
    "adapter_row_missing",
    "database_damaged",
    "dataset_damaged",
    "dataset_missing",
    "metrics_differ",
    "metrics_gap",
    "no_live_lease",
    "orphan",
    "recovery_point_damaged",
    "recovery_point_missing",
    "recovery_point_of_ended_job",
    "request_missing",
    "row_without_parent",
    "run_missing",
    "tokenizer_damaged",
    "tokenizer_missing",
    "tokens_damaged",
    "tokens_missing",
]
"""Stable words for programs."""
Answer = TypeVar("Answer")


@dataclass(frozen=True, order=True)
class Finding:
    """One thing that is not as it must be."""

    kind: Kind
    id: str
    """Of the row, or the key of the folder."""
    message: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def open_as_it_is(settings: Settings) -> Database:
    """As `open_current`, and also where the tables do not say any more of which version they are."""
    try:
        return open_current(settings)
    except MixloomError as error:
        if error.code != "database_damaged":
            raise
        return Database(settings.database)


def examine(database: Database, store: LocalStore) -> list[Finding]:
    """Everything that is wrong; each file that a row names is read, but those of requests.

    The server may be at work meanwhile: what a second look does not find was only being changed.
    """
    found = _look(database, store)
    if found:
        time.sleep(1)
        again = set(_look(database, store))
        found = [finding for finding in found if finding in again]
    return found


def examine_files(database: Database, store: LocalStore) -> list[Finding]:
    """Of that what concerns the files that rows name, at first sight.

    All rows are read first: of large files a look takes longer than PostgreSQL lets a transaction be idle.
    """
    found: list[Finding] = []
    folders = _folders(database, found)
    requests = _read(database, _requests, found)
    for folder in folders:
        found += _compared(store, folder)
    for id_, key in requests:
        if not store.path(key).is_dir():
            found.append(Finding("request_missing", id_, "Its files are not there; it goes an hour after its time."))
    return sorted(set(found))


def incomplete(database: Database, store: LocalStore) -> set[str]:
    """Keys of folders that do not have each file that their rows name, whatever is in it."""
    return {folder.key for folder in _folders(database, []) if not folder.is_complete(store)}


def _look(database: Database, store: LocalStore) -> list[Finding]:
    found: list[Finding] = []
    for check in (_database, _leases, _jobs, _metrics):
        found += _read(database, check, found)
    lost: list[str] = []
    with _noting_damage(database, found):
        lost = orphans(database.read, store)
    message = (
        "No row names this folder. A daemon erases it when it has lived for an hour; of a backup the next one does."
    )
    found += (Finding("orphan", key, message) for key in lost)
    return sorted({*found, *examine_files(database, store)})


def _folders(database: Database, found: list[Finding]) -> "list[_Folder]":
    nouns = (_adapters, _recovery_points, _datasets, _tokens, _bases)
    return [folder for noun in nouns for folder in _read(database, noun, found)]


def _read(database: Database, question: Callable[[Session], Iterable[Answer]], found: list[Finding]) -> list[Answer]:
    """What the rows say."""
    answers: list[Answer] = []
    with _noting_damage(database, found), database.read() as session:
        answers.extend(question(session))
    return answers


@contextmanager
def _noting_damage(database: Database, found: list[Finding]) -> Iterator[None]:
    """That the database cannot read its rows, or nobody what they hold, is found, too, and ends this question alone."""
    try:
        yield
    except DatabaseError as error:
        if not is_damaged(error):
            raise
        found.append(_damage_of(database, f"says: {error.orig}"))
    except ValueError as error:
        found.append(_damage_of(database, f"gave what is no value of its column: {error}"))


def _damage_of(database: Database, said: str) -> Finding:
    if database.path is not None:
        return _damage(f"SQLite {said}")
    return Finding("database_damaged", "PostgreSQL", f"It {said.splitlines()[0]}. Restore a backup.")


def _damage(said: str) -> Finding:
    return Finding("database_damaged", "mixloom.db", f"{' '.join(said.split())}. {_RECOVER}")


@dataclass(frozen=True)
class _Folder:
    """What a row says of its files."""

    id: str
    key: str
    manifest: Manifest | None
    told: Mapping[str, str | None]
    """By a row of an older version, which has no manifest: the hash of a file, or only that it is there."""
    missing: Kind
    damaged: Kind
    advice: str

    def is_complete(self, store: LocalStore) -> bool:
        """Whether each file that the row names is there."""
        names = self.told if self.manifest is None else self.manifest
        path = store.path(self.key)
        return path.is_dir() and all((path / name).is_file() for name in names)


def _compared(store: LocalStore, folder: _Folder) -> Iterator[Finding]:
    path, manifest = store.path(folder.key), folder.manifest
    if not folder.is_complete(store):
        yield Finding(folder.missing, folder.id, f"Its files are not in {folder.key}. {folder.advice}")
    elif not (_is_as_told(path, folder.told) if manifest is None else is_whole(path, manifest)):
        yield Finding(folder.damaged, folder.id, f"{folder.key} is not what was written. {folder.advice}")


def _is_as_told(folder: Path, told: Mapping[str, str | None]) -> bool:
    return all(sha256 is None or sha256_of(folder / name) == sha256 for name, sha256 in told.items())


def _adapters(session: Session) -> Iterator[_Folder]:
    for one in session.scalars(select(Adapter)):
        told = {WEIGHTS: one.sha256, CONFIG: None}
        yield _Folder(one.id, one.key, one.manifest, told, "adapter_missing", "adapter_damaged", _RESTORE)


def _recovery_points(session: Session) -> Iterator[_Folder]:
    advice = "Its run takes the point before it, if any."
    for one in session.scalars(select(RecoveryPoint)):
        yield _Folder(one.id, one.key, one.manifest, {}, "recovery_point_missing", "recovery_point_damaged", advice)


def _datasets(session: Session) -> Iterator[_Folder]:
    for one in session.scalars(select(Dataset)):
        told = {CONTENT_FILE: one.sha256, ROWS_FILE: None}
        key = f"datasets/{one.id}"
        yield _Folder(one.id, key, one.manifest, told, "dataset_missing", "dataset_damaged", _RESTORE)


def _tokens(session: Session) -> Iterator[_Folder]:
    told = {"train.safetensors": None}
    for one in session.scalars(select(Job)):
        yield _Folder(one.id, one.tokens_key, one.tokens_manifest, told, "tokens_missing", "tokens_damaged", _RESTORE)


def _bases(session: Session) -> Iterator[_Folder]:
    advice = "A daemon that serves this base writes its tokenizer again at its start."
    for one in session.scalars(select(Base)):
        yield _Folder(one.hash, one.folder_key, one.manifest, {}, "tokenizer_missing", "tokenizer_damaged", advice)


def _requests(session: Session) -> Iterable[tuple[str, str]]:
    return [(one.id, one.key) for one in session.execute(select(Operation.id, Operation.key))]


def _database(session: Session) -> Iterator[Finding]:
    """SQLite's own word on its file. PostgreSQL keeps checksums of its own."""
    if session.get_bind().dialect.name != "sqlite":
        return
    for (said,) in session.execute(text("PRAGMA integrity_check")):
        if said != "ok":
            yield _damage(f"SQLite says: {said}")
    for table in Table.metadata.sorted_tables:
        for column in (one for one in table.columns if isinstance(one.type, JSON)):
            is_broken = f"{column.name} IS NOT NULL AND NOT json_valid({column.name})"
            for row in session.scalars(text(f"SELECT rowid FROM {table.name} WHERE {is_broken}")):
                message = (
                    f"Its {column.name} is not JSON. Restore a backup, or stop the server and mend it with sqlite3."
                )
                yield Finding("database_damaged", f"{table.name} {row}", message)
    for table, row, parent, _ in session.execute(text("PRAGMA foreign_key_check")):
        message = f"The row of {parent} that it belongs to is not there. Restore a backup, or stop the server and "
        delete = f"`DELETE FROM {table} WHERE rowid = {row}` with sqlite3."
        yield Finding("row_without_parent", f"{table} {row}", message + delete)


def _leases(session: Session) -> Iterator[Finding]:
    """Who trains is leased by a daemon that lives."""
    epochs = {daemon.epoch for daemon in live_daemons(session)}
    held = select(Job.id, Run.lease_epoch).join(Run, Run.job_id == Job.id).where(Job.status.in_(RESIDENT))
    for job_id, lease_epoch in session.execute(held):
        if lease_epoch not in epochs:
            message = f"It is shown as training and no live daemon has it. It waits again at {_heard(session)}."
            yield Finding("no_live_lease", job_id, message)


def _heard(session: Session) -> str:
    """When a life that is over is noticed."""
    is_sqlite = session.get_bind().dialect.name == "sqlite"
    return "the start of the next daemon" if is_sqlite else "the next heartbeat or start of any daemon"


def _jobs(session: Session) -> Iterator[Finding]:
    """What a job's row says of other rows."""
    without = select(Job.id).where(Job.id.not_in(select(Run.job_id)))
    for job_id in session.scalars(without):
        yield Finding("run_missing", job_id, f"It has no run, so it can never train. {_RESTORE}")
    lost = select(Job.id).where(Job.adapter_id.is_not(None), Job.adapter_id.not_in(select(Adapter.id)))
    for job_id in session.scalars(lost):
        yield Finding("adapter_row_missing", job_id, f"The adapter that it names is not there. {_RESTORE}")
    long_before = Daemon.heartbeat_at - SAFE_SECONDS
    has_lived_since = exists().where(Daemon.started_at < long_before, Job.finished_at < long_before)
    ended = select(RecoveryPoint.id).join(Run, Run.id == RecoveryPoint.run_id).join(Job, Job.id == Run.job_id)
    for id_ in session.scalars(ended.where(Job.status.in_(ENDED), has_lived_since)):
        yield Finding("recovery_point_of_ended_job", id_, _FORGET)


def _metrics(session: Session) -> Iterator[Finding]:
    """Every step of a job is in its metrics once, up to the step and the tokens that its row says."""
    count, last, trained = (
        func.count(Metric.step),
        func.coalesce(func.max(Metric.step), 0),
        func.coalesce(func.max(Metric.tokens), 0),
    )
    counted = (
        select(Job.id, Job.step, Job.tokens, count, last, trained)
        .outerjoin(Metric, Metric.job_id == Job.id)
        .group_by(Job.id, Job.step, Job.tokens)
        .having((count != Job.step) | (last != Job.step) | (trained != Job.tokens))
    )
    for job_id, step, tokens, num, last_step, last_tokens in session.execute(counted):
        if num != step or last_step != step:
            message = f"Its row says {step} steps; its metrics hold {num}, the last is {last_step}. {_RECORD}"
            yield Finding("metrics_gap", job_id, message)
        if last_tokens != tokens:
            message = f"Its row says {tokens} trained tokens, its metrics say {last_tokens}. {_RECORD}"
            yield Finding("metrics_differ", job_id, message)


_RESTORE = "Restore it from a backup, or delete it."
_RECOVER = (
    "Stop the server and restore a backup; without one, `sqlite3 mixloom.db .recover` saves what can still be read."
)
_FORGET = (
    "Its job has ended. A daemon erases such points at each turn, and one has lived for an hour since: see its log."
)
_RECORD = "No adapter depends on that. If you need the record, restore a backup; or let its tenant delete the job."
