"""The database is what the tables say, whoever opens it first."""

import multiprocessing
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import text

from server.admin_key import ensure_admin_key
from server.db import migrate
from server.db.session import Database
from server.db.tables import Table
from server.errors import MixloomError
from server.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data")


def revision_of(path: Path) -> str:
    with closing(sqlite3.connect(path)) as connection:
        return str(connection.execute("SELECT version_num FROM alembic_version").fetchone()[0])


def test_migrations_and_tables_give_the_same_database(settings: Settings) -> None:
    migrate.upgrade(settings)
    with Database(settings.database_path).engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, Table.metadata) == []


def test_columns_have_the_same_types_and_nulls_in_both(settings: Settings, tmp_path: Path) -> None:
    migrate.upgrade(settings)
    fresh = Database(tmp_path / "fresh.db")
    Table.metadata.create_all(fresh.engine)
    for table in Table.metadata.tables:
        columns = []
        for path in (settings.database_path, fresh.path):
            with closing(sqlite3.connect(path)) as connection:
                columns.append(connection.execute(f"PRAGMA table_info({table})").fetchall())
        assert columns[0] == columns[1]


def test_an_upgraded_database_is_left_as_it_is(settings: Settings) -> None:
    migrate.upgrade(settings)
    before = sorted(path.name for path in settings.data_dir.iterdir())
    migrate.upgrade(settings)
    assert sorted(path.name for path in settings.data_dir.iterdir()) == before


def test_a_copy_is_made_before_an_existing_database_changes(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrate.upgrade(settings)
    first = revision_of(settings.database_path)
    later = later_version(tmp_path, first, "CREATE TABLE later (id INTEGER)")
    monkeypatch.setattr(migrate.migrations, "__file__", str(later))
    migrate.upgrade(settings)
    copy = settings.data_dir / f"mixloom.db.before-{first}"
    assert (revision_of(copy), revision_of(settings.database_path)) == (first, "later")


def test_a_migration_that_fails_changes_nothing(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrate.upgrade(settings)
    first = revision_of(settings.database_path)
    later = later_version(tmp_path, first, "CREATE TABLE later (id INTEGER)", "not SQL")
    monkeypatch.setattr(migrate.migrations, "__file__", str(later))
    with pytest.raises(Exception, match="syntax error"):
        migrate.upgrade(settings)
    assert revision_of(settings.database_path) == first
    with closing(sqlite3.connect(settings.database_path)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master WHERE name = 'later'").fetchall() == []


def later_version(tmp_path: Path, first: str, *statements: str) -> Path:
    """A `migrations` package as ours with one more revision; the path of its `__init__.py`."""
    source = Path(migrate.migrations.__file__ or "").parent
    package = tmp_path / "migrations"
    (package / "versions").mkdir(parents=True)
    for path in source.rglob("*.py"):
        (package / path.relative_to(source)).write_text(path.read_text())
    upgrade = "".join(f"    op.execute({statement!r})\n" for statement in statements)
    (package / "versions" / "later.py").write_text(
        f"from alembic import op\n\nrevision = 'later'\ndown_revision = {first!r}\n\n\ndef upgrade():\n{upgrade}"
    )
    return package / "__init__.py"


def test_a_newer_database_is_refused(settings: Settings) -> None:
    migrate.upgrade(settings)
    with Database(settings.database_path).engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'from the future'"))
    with pytest.raises(MixloomError, match="newer version") as caught:
        migrate.upgrade(settings)
    assert caught.value.code == "database_too_new"


def test_processes_that_start_at_once_share_the_work(settings: Settings) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=migrate.upgrade, args=(settings,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert revision_of(settings.database_path)


@pytest.mark.parametrize("start", [migrate.upgrade, ensure_admin_key])
def test_a_data_directory_that_cannot_be_written_is_named(start: Callable[[Settings], object], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MixloomError, match="cannot be written") as caught:
        start(Settings(data_dir=tmp_path / "file" / "data"))
    assert caught.value.code == "data_dir_not_writable"
    assert str(tmp_path / "file" / "data") in caught.value.message
