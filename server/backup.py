"""A copy of a data directory that is itself one: `mixloom admin backup`, made while the server runs, and `restore`.

What rows name never changes, so a folder that the copy has already is not copied again. The tables come first, as
they are at one moment. What they name may be erased before its turn comes: then newer tables are taken, until all
that they name is there.
"""

import os
import shutil
import sqlite3
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL

from server.db import adapters, bases, datasets, jobs, recovery_points
from server.db.session import Database
from server.doctor import Finding, examine_files
from server.errors import MixloomError
from server.settings import Settings
from server.store import LocalStore

DATABASE, KEY = "mixloom.db", "admin.key"
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

    Raises `not_sqlite`, `no_database`, `not_a_backup`.
    """
    if settings.database_url is not None:
        raise MixloomError(
            "not_sqlite",
            "The tables are in PostgreSQL, which has its own way: `mixloom admin drain --wait`, then "
            "`pg_dump --format=custom --file=FILE DATABASE` and a copy of the data directory, then "
            "`mixloom admin undrain`. docs/operations.md has the steps back.",
            400,
            "database_url",
        )
    if target.exists() and any(target.iterdir()) and not (target / DATABASE).exists():
        raise MixloomError(
            "not_a_backup", f"{target} is not empty and holds no {DATABASE}. Name an empty folder, or a backup.", 400
        )
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    return _copy(settings.data_dir, target)


def restore(settings: Settings, source: Path) -> Copied:
    """Make a data directory of a backup. Raises `not_sqlite`, `no_database`, `data_dir_not_empty`."""
    if settings.database_url is not None:
        raise MixloomError(
            "not_sqlite",
            "The tables are in PostgreSQL: bring them back with `pg_restore`, and copy the data directory's files.",
            400,
            "database_url",
        )
    target = settings.data_dir
    if target.exists() and any(target.iterdir()):
        raise MixloomError(
            "data_dir_not_empty",
            f"{target} is not empty. Move what is in it away, or name another folder with --data-dir.",
            400,
            "data_dir",
        )
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    return _copy(source, target)


def _copy(source: Path, target: Path) -> Copied:
    if not (source / DATABASE).is_file():
        raise MixloomError("no_database", f"There is no {DATABASE} in {source}. Name another folder.", 400)
    store, copies = LocalStore(source), LocalStore(target)
    had = _folders(copies)
    new = target / f"{DATABASE}.new"
    missing: set[str] | None = None
    while True:
        _copy_tables(source / DATABASE, new)
        database = Database(URL.create("sqlite", database=str(new)))
        keys, before = _named(database), missing
        missing = {key for key in keys if not _copy_folder(store, copies, key)}
        if not missing or missing == before:  # what two tables name and is not there is lost
            break
        database.close()
    findings = examine_files(database, copies)
    database.close()
    with closing(sqlite3.connect(new)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")  # one file, which can be read where nothing can be written
    _copy_key(source / KEY, target / KEY)
    _remove(target / DATABASE, "-wal", "-shm")  # whoever has looked into the last one may have left them
    copies.publish_file(new, DATABASE)
    surplus = _folders(copies) - keys
    for key in surplus:
        copies.delete(key)
    return Copied(len(keys - missing), len(keys - missing - had), len(surplus), findings)


def _copy_tables(source: Path, target: Path) -> None:
    """The tables at one moment. Requests to `/generate` stay behind: nobody waits for their answers any more."""
    _remove(target, "", "-wal", "-shm")
    with (
        closing(sqlite3.connect(f"{source.resolve().as_uri()}?mode=ro", uri=True)) as original,
        closing(sqlite3.connect(target)) as copy,
    ):
        original.backup(copy)
        copy.execute("DELETE FROM operations")
        copy.commit()


def _remove(path: Path, *suffixes: str) -> None:
    for suffix in suffixes:
        path.with_name(f"{path.name}{suffix}").unlink(missing_ok=True)


def _named(database: Database) -> set[str]:
    with database.read() as session:
        nouns = (adapters, jobs, datasets, bases, recovery_points)
        return {key for noun in nouns for key in noun.all_keys(session)}


def _folders(store: LocalStore) -> set[str]:
    runs = store.list("recovery")
    return {key for prefix in (*_PREFIXES, *runs) for key in store.list(prefix)}


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


def _copy_key(source: Path, target: Path) -> None:
    if source.exists():
        with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(source.read_text())
