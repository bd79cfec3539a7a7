"""Brings the database to this version's tables: under a lock, SQLite after a copy, in one transaction."""

import fcntl
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import cache
from pathlib import Path
from typing import IO

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, exists, select
from sqlalchemy.exc import DatabaseError, OperationalError

import migrations
from server.data_dir import DAEMON_LOCK, ensure_data_dir
from server.db.daemons import IS_LIVE
from server.db.session import Database, is_damaged, one_at_a_time
from server.db.stores import refuse_new_database
from server.errors import MixloomError
from server.settings import Settings

WAIT_SECONDS = 15.0
POLL_SECONDS = 0.2
LEASES = "0008"
"""The revision since which daemons have leases."""


def upgrade(settings: Settings, *, is_daemon: bool = False) -> None:
    """Apply what is missing. Any number of processes may call it at once; one does the work, the others wait.

    `is_daemon`: the caller holds the daemon's lock of SQLite. Nobody changes tables that another daemon works with.

    Raises `data_dir_not_writable`, `other_data_dir`, `database_unreachable`, `database_damaged`, `daemon_at_work`,
    `not_upgraded`, `postgres_not_installed`, or `database_too_new` when a later version of the code has been here.
    """
    ensure_data_dir(settings)
    refuse_new_database(settings)
    database = Database(settings.database, is_patient=True)  # of large tables a migration takes its time
    with ExitStack() as locks:
        if _is_old(database) and database.path is None:
            _wait_while(database, lambda: _is_leased(database), settings.lease_seconds)
        elif _is_old(database) and not is_daemon:
            locks.enter_context(_no_daemon(settings, database))
        locks.enter_context(_locked(settings.data_dir))
        if database.path is not None and _is_old(database):
            with _one_sentence(database):
                _copy(database.path, _revision(database))
                upgrade_tables(database)
        else:
            upgrade_tables(database)


def _is_old(database: Database) -> bool:
    current = _revision(database)
    return current is not None and bool(_pending(current, database))


def upgrade_tables(database: Database) -> None:
    """The same for a database alone: of SQLite one that nobody else has open, and no copy is made of it.

    Raises `database_unreachable`, `postgres_not_installed`, `database_too_new`.
    """
    if _pending(_revision(database), database):
        with database.write() as session:
            one_at_a_time(session, "migrations")
            command.upgrade(_config(session.connection()), "head")


def open_current(settings: Settings) -> Database:
    """The database that is there, left as it is.

    Raises `no_database`, `other_version`, `database_too_new`, `database_damaged`, `database_unreachable`,
    `postgres_not_installed`.
    """
    database = Database(settings.database)
    if database.path is not None and not (database.path.is_file() and database.path.stat().st_size):
        missing = f"database in {database.path}, which is empty" if database.path.is_file() else str(database.path)
        message = f"There is no {missing}. Name the server's folder with --data-dir, or restore a backup."
        raise MixloomError("no_database", message, 400, "data_dir")
    if _pending(_revision(database), database):
        message = f"The database {database.name} is of an older version. `mixloom db upgrade` brings it up to date."
        raise MixloomError("other_version", message, 400)
    return database


def refuse_newer(database: Database) -> None:
    """For who is at work, and meets what it does not know. Raises `database_too_new`."""
    _pending(_read_revision(database), database)


@contextmanager
def reaching(database: Database) -> Iterator[None]:
    """For the first that is asked of it. Raises `database_unreachable`, `database_damaged`."""
    try:
        yield
    except DatabaseError as error:
        said = str(error.orig).strip().partition("\n")[0]
        if is_damaged(error):
            raise MixloomError(
                "database_damaged",
                f"The database {database.name} is damaged ({said}). `mixloom admin doctor` says what can still be "
                "read; restore a backup.",
                500,
            ) from error
        if not isinstance(error, OperationalError):
            raise
        raise MixloomError(
            "database_unreachable",
            f"The database {database.name} cannot be reached ({said}). Start it, or mend MIXLOOM_DATABASE_URL.",
            500,
            "database_url",
        ) from error


def _revision(database: Database) -> str | None:
    with reaching(database):
        return _read_revision(database)


def _read_revision(database: Database) -> str | None:
    with database.engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.attributes["connection"] = connection
    return config


@cache
def _revisions(folder: str) -> list[str]:
    """What this version knows, the newest first. To read them is to run their files: once a process is enough."""
    return [script.revision for script in ScriptDirectory(folder).walk_revisions()]


def _pending(current: str | None, database: Database) -> list[str]:
    known = _revisions(str(Path(migrations.__file__).parent))
    if current is None:
        return known
    if current not in known:
        raise MixloomError(
            "database_too_new",
            f"The database {database.name} was written by a newer version (its revision is {current}, the newest "
            f"known here is {known[0]}). Start that one, or restore a copy from before it.",
            500,
        )
    return known[: known.index(current)]


@contextmanager
def _one_sentence(database: Database) -> Iterator[None]:
    """For what SQLite or its disk does not do. Raises `not_upgraded`."""
    try:
        yield
    except (sqlite3.Error, DatabaseError) as error:
        said = str(getattr(error, "orig", None) or error)
        raise MixloomError(
            "not_upgraded",
            f"The database {database.name} could not be brought to this version ({said}); it is as it was. On its "
            "disk there must be room for a copy of it and as much again. Mend that and start again.",
            500,
        ) from error


def _copy(path: Path, revision: str | None) -> None:
    copy = path.with_name(f"{path.name}.before-{revision}")
    try:
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
    except sqlite3.Error:  # what is there of it is no way back
        copy.unlink(missing_ok=True)
        raise


@contextmanager
def _no_daemon(settings: Settings, database: Database) -> Iterator[None]:
    """SQLite's daemon does not begin meanwhile. Raises `daemon_at_work`."""
    with (settings.data_dir / DAEMON_LOCK).open("a") as lock:
        _wait_while(database, lambda: not _took(lock), 0.0)
        yield


def _took(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_leased(database: Database) -> bool:
    """Whether a daemon of PostgreSQL lives."""
    if LEASES in _pending(_revision(database), database):
        return False
    with reaching(database), database.read() as session:
        return bool(session.scalar(select(exists().where(IS_LIVE))))


def _wait_while(database: Database, is_at_work: Callable[[], bool], lease_seconds: float) -> None:
    """Until no daemon works with older tables: one that starts, ends or is dead. Raises `daemon_at_work`."""
    end = time.monotonic() + WAIT_SECONDS + lease_seconds
    while is_at_work() and _is_old(database):  # else it is of this version, and was faster
        if time.monotonic() > end:
            raise MixloomError(
                "daemon_at_work",
                f"The tables of {database.name} are of an older version, and a daemon is at work on them. "
                "Stop each, and the `serve` that starts it again; then start this version.",
                500,
            )
        time.sleep(POLL_SECONDS)


@contextmanager
def _locked(data_dir: Path) -> Iterator[None]:
    """One process of this machine at a time; those of others wait inside PostgreSQL."""
    with (data_dir / "migrate.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
