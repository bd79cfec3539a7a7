"""Brings the database to this version's tables: under a lock, after a copy, in one transaction."""

import fcntl
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

import migrations
from server.data_dir import ensure_data_dir
from server.db.session import Database
from server.errors import MixloomError
from server.settings import Settings


def upgrade(settings: Settings) -> None:
    """Apply what is missing. Any number of processes may call it at once; one does the work, the others wait.

    Raises `data_dir_not_writable`, or `database_too_new` when a later version of the code has been here.
    """
    ensure_data_dir(settings)
    with _locked(settings.data_dir), Database(settings.database_path).engine.connect() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
        pending = _pending(current, settings.database_path)
        if not pending:
            return
        if current is not None:
            _copy(settings.database_path, current)
        connection.rollback()
        connection.execute(text("BEGIN IMMEDIATE"))
        command.upgrade(_config(connection), "head")
        connection.commit()


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.attributes["connection"] = connection
    return config


def _pending(current: str | None, path: Path) -> list[str]:
    scripts = ScriptDirectory.from_config(_config())
    known = [script.revision for script in scripts.walk_revisions()]  # newest first
    if current is None:
        return known
    if current not in known:
        raise MixloomError(
            "database_too_new",
            f"The database {path} was written by a newer version (its revision is {current}, the newest "
            f"known here is {known[0]}). Start that one, or restore the copy it made beside the database.",
            500,
        )
    return known[: known.index(current)]


def _copy(path: Path, revision: str) -> None:
    with (
        closing(sqlite3.connect(path)) as source,
        closing(sqlite3.connect(path.with_name(f"{path.name}.before-{revision}"))) as target,
    ):
        source.backup(target)


@contextmanager
def _locked(data_dir: Path) -> Iterator[None]:
    with (data_dir / "migrate.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
