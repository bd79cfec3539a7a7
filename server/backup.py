"""A copy of a data directory that is itself one: `mixloom admin backup`, made while the server runs, and `restore`.

What rows name never changes, so a folder that the copy has already is not copied again. The tables come first, as
they are at one moment. What they name may be erased before its turn comes: then newer tables are taken, until all
that they name is there.

A backup's tables are SQLite's, whichever database they come from, and are restored into either.
"""

import fcntl
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError

from server.db import adapters, bases, datasets, jobs, leases, operations, recovery_points
from server.db.copying import copy_rows, need_empty
from server.db.migrate import open_current, upgrade_tables
from server.db.session import Database
from server.db.stores import MARK, check_store, read_mark
from server.doctor import Finding, examine_files, incomplete
from server.errors import MixloomError
from server.settings import Settings
from server.store import LocalStore

DATABASE, KEY = "mixloom.db", "admin.key"
LOCK = "backup.lock"
"""A file that a backup holds in its folder while it is made, and which shows the next one what that folder is."""
_PREFIXES = ("adapters", "uploads", "jobs", "datasets", "bases")


@dataclass(frozen=True)
class Copied:
    """What a backup or a restore came to."""

    folders: int
    """That the copy has now."""
    new: int
    """Of these, those that it had not before."""
    removed: int
    """Folders that it had and no row names any more."""
    findings: list[Finding]
    """Files in the copy that are not what its rows say: they were so in the original, or the copy was damaged since."""


def back_up(settings: Settings, target: Path) -> Copied:
    """Bring the backup in `target` up to date. Until the last moment it is the one that was there before.

    Raises `not_a_backup`, `backup_at_work`, `not_copied`, `other_data_dir`, `database_damaged`, and what else
    `open_current` does.
    """
    if target.resolve() == settings.data_dir.resolve():
        raise MixloomError("not_a_backup", f"{target} is the data directory itself. Name another folder.", 400)
    with _one_sentence("What was there before is as it was. Mend that and back up again."):
        is_one = (target / DATABASE).exists() or (target / LOCK).exists()
        if target.exists() and any(target.iterdir()) and not is_one:
            raise MixloomError(
                "not_a_backup",
                f"{target} is not empty and holds no {DATABASE}. Name an empty folder, or a backup.",
                400,
            )
        original = open_current(settings)
        check_store(settings, original)
        if read_mark(target) not in (None, read_mark(settings.data_dir)):
            raise MixloomError("not_a_backup", f"{target} is a backup of another server. Name another folder.", 400)
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _alone(target):
            return _copy(original, settings.data_dir, target, lambda copy: _publish(copy, LocalStore(target)))


def restore(settings: Settings, source: Path) -> Copied:
    """Make a data directory of a backup, and with PostgreSQL the rows of an empty database.

    Raises `no_database`, `data_dir_not_empty`, `database_not_empty`, `database_damaged`, `database_too_new`,
    `database_unreachable`, `postgres_not_installed`, `rows_refused`, `not_copied`.
    """
    target, database = settings.data_dir, Database(settings.database, is_patient=True)
    with _one_sentence(f"Mend that, empty {target} and restore again."):
        if target.exists() and any(target.iterdir()):
            raise MixloomError(
                "data_dir_not_empty",
                f"{target} is not empty. Move what is in it away, or name another folder with --data-dir.",
                400,
                "data_dir",
            )
        if not (source / DATABASE).is_file() or (source / DATABASE).stat().st_size == 0:
            raise MixloomError("no_database", f"There is no {DATABASE} in {source}. Name another folder.", 400)
        if database.path is None:
            need_empty(database)
            upgrade_tables(database)
        target.mkdir(mode=0o700, parents=True, exist_ok=True)

        def publish(copy: Database) -> None:
            if database.path is None:
                copy_rows(copy, database)
            else:
                _publish(copy, LocalStore(target))

        return _copy(_sqlite(source / DATABASE), source, target, publish)


@contextmanager
def _one_sentence(what_to_do: str) -> Iterator[None]:
    """For what the disk or a database does not do, or a value that is none of its column. Raises `not_copied`."""
    try:
        yield
    except (OSError, sqlite3.Error, SQLAlchemyError, ValueError) as error:
        reason = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
        raise MixloomError("not_copied", f"The copy is not complete ({reason}). {what_to_do}", 500) from error


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """One backup at a time in a folder. Raises `backup_at_work`."""
    with (target / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MixloomError(
                "backup_at_work",
                f"Another backup is being made in {target}. This one changed nothing; wait for that one's end, or name "
                "another folder.",
                409,
            ) from error
        yield


def _copy(original: Database, source: Path, target: Path, publish: Callable[[Database], None]) -> Copied:
    """Copy tables and files; what makes the copy valid, and what was there before it invalid, is to `publish` them."""
    store, copies = LocalStore(source), LocalStore(target)
    had = _folders(copies)
    new = target / f"{DATABASE}.new"
    missing: set[str] | None = None
    try:
        while True:
            tables = _take_tables(original, new)
            keys, before = _named(tables), missing
            for key in before or ():
                if store.path(key).is_dir():  # of which the copy may have a part
                    copies.delete(key)
            missing = {key for key in keys if not _copy_folder(store, copies, key)} | incomplete(tables, copies)
            if not missing or missing == before:  # what two tables name and is not there is lost
                break
            tables.close()
        findings = examine_files(tables, copies)
        for name in (KEY, MARK):
            _copy_private(store, copies, name)
        publish(tables)
    finally:
        _remove(new)
    surplus = _folders(copies) - keys - {key.rpartition("/")[0] for key in keys}
    for key in surplus:
        copies.delete(key)
    removed = {key for key in surplus if not key.endswith(".tmp")} - {key.rpartition("/")[0] for key in surplus}
    return Copied(len(keys - missing), len(keys - missing - had), len(removed), findings)


def _take_tables(original: Database, path: Path) -> Database:
    """A new file of SQLite with the tables at one moment, as this version has them.

    Nobody lives there, nor waits for an answer to `/generate`.
    """
    _remove(path)
    if original.path is not None:
        with (
            closing(sqlite3.connect(f"{original.path.resolve().as_uri()}?mode=ro", uri=True)) as source,
            closing(sqlite3.connect(path)) as target,
        ):
            source.backup(target)
            (said,) = target.execute("PRAGMA integrity_check(1)").fetchone()
        if said != "ok":
            raise MixloomError(
                "database_damaged",
                f"The database {original.name} is damaged ({' '.join(said.split())}), so nothing was copied. `mixloom "
                "admin doctor` says what can still be read; an earlier backup is whole.",
                500,
            )
    tables = _sqlite(path)
    upgrade_tables(tables)
    if original.path is None:
        copy_rows(original, tables)
    with tables.write() as session:
        operations.remove_all(session)
        leases.end_all(session)
    return tables


def _publish(tables: Database, copies: LocalStore) -> None:
    """Put them where those of the last backup are, if there was one."""
    assert tables.path is not None
    tables.close()
    with closing(sqlite3.connect(tables.path)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")  # one file, which can be read where nothing can be written
    for suffix in ("-wal", "-shm"):  # whoever has looked into the last one may have left them
        copies.path(f"{DATABASE}{suffix}").unlink(missing_ok=True)
    tables.path.chmod(0o600)
    copies.publish_file(tables.path, DATABASE)


def _sqlite(path: Path) -> Database:
    return Database(URL.create("sqlite", database=str(path)))


def _remove(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(f"{path.name}{suffix}").unlink(missing_ok=True)


def _named(database: Database) -> set[str]:
    with database.read() as session:
        nouns = (adapters, jobs, datasets, bases, recovery_points)
        return {key for noun in nouns for key in noun.all_keys(session)}


def _folders(store: LocalStore) -> set[str]:
    """Unfinished ones of a backup that was killed among them, and those that hold a run's recovery points."""
    runs = store.children("recovery")
    return {*runs, *(key for prefix in (*_PREFIXES, *runs) for key in store.children(prefix))}


def _copy_folder(store: LocalStore, copies: LocalStore, key: str) -> bool:
    """Whether the copy has it now. A base's tokenizer may have been replaced since: it is copied each time."""
    if copies.path(key).is_dir() and not key.startswith("bases/"):
        return True

    def write(folder: Path) -> None:
        for file in store.path(key).iterdir():
            shutil.copyfile(file, folder / file.name)

    with suppress(FileNotFoundError):  # it is being erased
        copies.put(key, write)
        return True
    return False


def _copy_private(store: LocalStore, copies: LocalStore, name: str) -> None:
    """A file that its owner alone may read. A draft that a kill leaves is overwritten by the next one."""
    original, draft = store.path(name), copies.path(f"{name}.new")
    if original.exists():
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(original.read_text())
        copies.publish_file(draft, name)
