"""The database is what the tables say, whoever opens it first."""

import multiprocessing
import resource
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import URL, Connection, MetaData, inspect, select, text
from sqlalchemy.orm import Session

from server import children
from server.admin_key import ensure_admin_key
from server.daemon.lock import hold
from server.data_dir import DAEMON_LOCK, ensure_data_dir
from server.db import migrate
from server.db.metrics import column_names, read_metrics
from server.db.session import Database, one_at_a_time
from server.db.tables import Job, Table
from server.errors import MixloomError
from server.serve import EXIT_BAD_BASE
from server.settings import Settings

CLOCK = "(SELECT EXTRACT(EPOCH FROM clock_timestamp()) AS s) AS clock"
"""PostgreSQL's, in seconds."""


@pytest.fixture
def database_url(request: pytest.FixtureRequest) -> str | None:
    """Of a database without tables."""
    url: str | None = None if request.param == "sqlite" else request.getfixturevalue("postgresql").new_database()
    return url


@pytest.fixture
def settings(tmp_path: Path, database_url: str | None) -> Settings:
    return Settings(data_dir=tmp_path / "data", database_url=database_url)


@contextmanager
def connected(url: URL) -> Iterator[Connection]:
    """A connection that leaves none in a pool."""
    engine = Database(url).engine
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def revision_of(url: URL) -> str:
    with connected(url) as connection:
        return str(connection.scalar(text("SELECT version_num FROM alembic_version")))


def schema(url: URL) -> dict[str, Any]:
    """All that the database itself knows of each table."""
    with connected(url) as connection:
        seen = inspect(connection)
        return {
            table: {
                "columns": [{**column, "type": repr(column["type"])} for column in seen.get_columns(table)],
                "key": seen.get_pk_constraint(table)["constrained_columns"],
                "foreign": by_column(seen.get_foreign_keys(table), "constrained_columns"),
                "unique": by_column(seen.get_unique_constraints(table), "column_names"),
                "indexes": by_column(seen.get_indexes(table), "column_names"),
            }
            for table in Table.metadata.tables
        }


def by_column(found: list[Any], key: str) -> list[Any]:
    plain = (
        {**one, "dialect_options": {k: str(v) for k, v in one.get("dialect_options", {}).items()}} for one in found
    )
    return sorted(plain, key=lambda one: str(one[key]))


def test_migrations_and_tables_give_the_same_database(settings: Settings, request: pytest.FixtureRequest) -> None:
    migrate.upgrade(settings)
    with connected(settings.database) as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, Table.metadata) == []
    url = None if settings.database_url is None else request.getfixturevalue("postgresql").new_database()
    fresh = settings.model_copy(update={"data_dir": settings.data_dir.with_name("fresh"), "database_url": url})
    fresh.data_dir.mkdir()
    with connected(fresh.database) as connection:
        Table.metadata.create_all(connection)
        connection.commit()
    assert schema(settings.database) == schema(fresh.database)


def test_an_upgraded_database_is_left_as_it_is(settings: Settings) -> None:
    migrate.upgrade(settings)
    before = sorted(path.name for path in settings.data_dir.iterdir())
    migrate.upgrade(settings)
    assert sorted(path.name for path in settings.data_dir.iterdir()) == before


REVISIONS = migrate._revisions(str(Path(migrate.migrations.__file__ or "").parent))
SOMETHING = {str: "1", int: 1, float: 1.0, bool: True, object: {}}
"""By a column's type in Python, where JSON is an object."""


@pytest.mark.parametrize("revision", REVISIONS)
def test_a_database_of_any_version_keeps_its_rows(settings: Settings, revision: str) -> None:
    """A row in each of the tables that the version had. What later versions added to it is nothing, or none yet."""
    ensure_data_dir(settings)
    files_are_hashes = revision < "0007"
    with connected(settings.database) as connection:
        command.upgrade(migrate._config(connection), revision)
        tables = tables_of(connection)
        for table in tables:
            connection.execute(table.insert().values(one_row(table, files_are_hashes=files_are_hashes)))
        connection.commit()
        before = {table.name: dict(connection.execute(table.select()).mappings().one()) for table in tables}
    migrate.upgrade(settings)
    with connected(settings.database) as connection:
        after = {
            table.name: dict(found)
            for table in tables_of(connection)
            if (found := connection.execute(table.select()).mappings().one_or_none()) is not None
        }
    if revision < "0016":
        before["counters"] = {"tenant_id": "1", "seat": 1, "trained_tokens": 0, "prompt_tokens": 0, "sampled_tokens": 0}
        for column in before["tenants"].keys() & {*before["counters"], "counter", "backlogged"}:
            before["counters"][column] = before["tenants"].pop(column)
        for name in before.keys() & {"runs", "daemons"}:
            before[name]["seat"] = 1
    assert before.keys() == after.keys() >= {"tenants", "jobs", "runs", "recovery_points", "metrics", "adapters"}
    if files_are_hashes:
        before["recovery_points"]["manifest"] = {"run.json": {"sha256": "0a", "bytes": None}}
    for name, row in before.items():
        assert {column: after[name].pop(column) for column in row} == row
        assert set(after[name].values()) <= {None, 0}
    with connected(settings.database) as connection, Session(connection) as session:
        for mapper in Table.registry.mappers:
            assert len(session.scalars(select(mapper.class_)).all()) == (mapper.class_.__tablename__ in before)
        job = session.get_one(Job, "1")
        (shown,) = read_metrics(session, job, from_step=0, every=None)[0]
        assert len(shown) == len(column_names(job))


def tables_of(connection: Connection) -> list[sqlalchemy.Table]:
    """Those of this version, who is referred to before who refers."""
    metadata = MetaData()
    metadata.reflect(connection)
    return [table for table in metadata.sorted_tables if table.name != "alembic_version"]


def one_row(table: sqlalchemy.Table, *, files_are_hashes: bool) -> dict[str, Any]:
    """Something in each column; every key is the same, so every reference holds."""
    row = {column.name: SOMETHING[column.type.python_type] for column in table.columns}
    if table.name == "recovery_points":
        row["manifest"] = {"run.json": "0a" if files_are_hashes else {"sha256": "0a", "bytes": 1}}
    return row


@pytest.mark.databases("sqlite")
def test_a_copy_is_made_before_an_existing_database_changes(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of SQLite: PostgreSQL has its own tools for that, and its own place."""
    migrate.upgrade(settings)
    first = revision_of(settings.database)
    later = later_version(tmp_path, first, "CREATE TABLE later (id INTEGER)")
    monkeypatch.setattr(migrate.migrations, "__file__", str(later))
    migrate.upgrade(settings)
    copy = URL.create("sqlite", database=str(settings.data_dir / f"mixloom.db.before-{first}"))
    assert (revision_of(copy), revision_of(settings.database)) == (first, "later")


@pytest.fixture
def older(settings: Settings) -> str:
    """The revision of a database that the version before this one has left."""
    ensure_data_dir(settings)
    with connected(settings.database) as connection:
        command.upgrade(migrate._config(connection), REVISIONS[1])
        connection.commit()
    return REVISIONS[1]


def test_a_share_below_a_hundredth_becomes_one_and_who_is_ahead_stays_so_by_as_much_work(settings: Settings) -> None:
    ensure_data_dir(settings)
    with connected(settings.database) as connection:
        command.upgrade(migrate._config(connection), "0016")
        for number, share in enumerate((1e-6, 0.5)):
            values = {"id": f"ten_{number}", "share": share, "seat": 1}
            connection.execute(
                text("INSERT INTO tenants (id, name, share, created_at) VALUES (:id, :id, :share, 0)"), values
            )
            connection.execute(
                text("INSERT INTO counters VALUES (:id, :seat, 1e9, :backlogged, 0, 0, 0)"),
                {**values, "backlogged": True},
            )
        connection.commit()
        migrate.upgrade(settings)
        assert list(connection.scalars(text("SELECT share FROM tenants ORDER BY id"))) == [0.01, 0.5]
        counters = connection.scalars(text("SELECT counter FROM counters ORDER BY tenant_id, seat"))
        assert list(counters) == pytest.approx([1e9 * 1e-6 / 0.01, 1e9])


@pytest.mark.databases("sqlite")
def test_the_tables_do_not_change_under_a_daemon_at_work(
    settings: Settings, older: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrate, "WAIT_SECONDS", 1.0)
    with hold(settings.data_dir / DAEMON_LOCK, supervised=False):
        with pytest.raises(MixloomError, match="a daemon is at work") as caught:
            migrate.upgrade(settings)
        assert caught.value.code == "daemon_at_work"
        assert revision_of(settings.database) == older
        migrate.upgrade(settings, is_daemon=True)
        migrate.upgrade(settings)
    assert revision_of(settings.database) == REVISIONS[0]


@pytest.mark.databases("postgresql")
def test_the_tables_of_postgresql_do_not_change_under_a_daemon_whose_lease_holds(
    settings: Settings, older: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrate, "WAIT_SECONDS", 1.0)
    settings = settings.model_copy(update={"lease_seconds": 1.0})
    with connected(settings.database) as connection:
        columns = "(pid, state, detail, floor, started_at, heartbeat_at, expires_at)"
        connection.execute(
            text(f"INSERT INTO daemons {columns} SELECT 1, 'ready', '{{}}', 0, s, s, s + 3600 FROM {CLOCK}")
        )
        connection.commit()
        with pytest.raises(MixloomError, match="a daemon is at work") as caught:
            migrate.upgrade(settings)
        assert caught.value.code == "daemon_at_work"
        assert revision_of(settings.database) == older
        connection.execute(text(f"UPDATE daemons SET expires_at = s + 1 FROM {CLOCK}"))
        connection.commit()
        migrate.upgrade(settings)
    assert revision_of(settings.database) == REVISIONS[0]


@pytest.mark.databases("sqlite")
def test_a_daemon_that_waits_for_another_one_has_not_touched_its_tables(settings: Settings, older: str) -> None:
    command = children.command("server", "daemon", "--data-dir", str(settings.data_dir), "--base", "/none")
    with hold(settings.data_dir / DAEMON_LOCK, supervised=False):
        waiting = subprocess.Popen(command, env=children.environment(), stderr=subprocess.PIPE, text=True)
        assert waiting.stderr is not None
        assert "waiting_for_lock" in waiting.stderr.readline()
        assert revision_of(settings.database) == older
    assert waiting.wait(60) == EXIT_BAD_BASE
    assert revision_of(settings.database) == REVISIONS[0]
    waiting.stderr.close()


@pytest.mark.databases("sqlite")
def test_a_disk_that_has_no_room_for_the_copy_is_said_in_a_sentence_and_nothing_changes(
    settings: Settings, older: str
) -> None:
    at_most = (settings.data_dir / "mixloom.db").stat().st_size // 2
    process = multiprocessing.get_context("fork").Process(target=upgrade_with_files_of, args=(at_most, settings))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert revision_of(settings.database) == older
    assert not list(settings.data_dir.glob("mixloom.db.before-*"))
    migrate.upgrade(settings)
    assert revision_of(settings.database) == REVISIONS[0]


def upgrade_with_files_of(most_bytes: int, settings: Settings) -> None:
    """Fails where none may be larger, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    with pytest.raises(MixloomError, match="could not be brought to this version") as caught:
        migrate.upgrade(settings)
    assert caught.value.code == "not_upgraded"


def test_a_migration_that_fails_changes_nothing(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrate.upgrade(settings)
    first = revision_of(settings.database)
    later = later_version(tmp_path, first, "CREATE TABLE later (id INTEGER)", "not SQL")
    monkeypatch.setattr(migrate.migrations, "__file__", str(later))
    with pytest.raises(Exception, match="syntax error"):
        migrate.upgrade(settings)
    assert revision_of(settings.database) == first
    with connected(settings.database) as connection:
        assert "later" not in inspect(connection).get_table_names()


def test_a_kill_in_a_migration_changes_nothing_and_the_next_start_does_it(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrate.upgrade(settings)
    first = revision_of(settings.database)
    later = later_version(tmp_path, first, "CREATE TABLE later (id INTEGER)")
    monkeypatch.setattr(migrate.migrations, "__file__", str(later))
    migration = later.parent / "versions" / "later.py"
    whole = migration.read_text()
    migration.write_text(f"{whole}    __import__('os').kill(__import__('os').getpid(), 9)\n")
    process = multiprocessing.get_context("fork").Process(target=migrate.upgrade, args=(settings,))
    process.start()
    process.join(60)
    assert process.exitcode == -9
    assert revision_of(settings.database) == first
    with connected(settings.database) as connection:
        assert "later" not in inspect(connection).get_table_names()
    migration.write_text(whole)
    migrate.upgrade(settings)
    assert revision_of(settings.database) == "later"


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
    with Database(settings.database).write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = 'from the future'"))
    with pytest.raises(MixloomError, match="newer version") as caught:
        migrate.upgrade(settings)
    assert caught.value.code == "database_too_new"


def test_processes_that_start_at_once_share_the_work(settings: Settings, tmp_path: Path) -> None:
    """On PostgreSQL they may be those of several machines, which no lock of a file holds up."""
    context = multiprocessing.get_context("spawn")
    folders = [settings.data_dir if settings.database_url is None else tmp_path / f"machine-{n}" for n in range(3)]
    alike = [settings.model_copy(update={"data_dir": folder}) for folder in folders]
    processes = [context.Process(target=migrate.upgrade, args=(one,)) for one in alike]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert revision_of(settings.database)


@pytest.mark.databases("postgresql")
def test_a_start_waits_for_anothers_migration_however_long_that_takes(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.db.session.BUSY_SECONDS", 1)  # whoever else waits for a lock gives up then
    with Database(settings.database, is_patient=True).write() as other:
        one_at_a_time(other, "migrations")
        start = threading.Thread(target=migrate.upgrade, args=(settings,))
        start.start()
        start.join(2)
        assert start.is_alive()
    start.join(60)
    assert revision_of(settings.database) == REVISIONS[0]


@pytest.mark.parametrize("start", [migrate.upgrade, ensure_admin_key])
def test_a_data_directory_that_cannot_be_written_is_named(start: Callable[[Settings], object], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MixloomError, match="cannot be written") as caught:
        start(Settings(data_dir=tmp_path / "file" / "data"))
    assert caught.value.code == "data_dir_not_writable"
    assert str(tmp_path / "file" / "data") in caught.value.message


def test_a_database_that_cannot_be_reached_is_named_without_its_password(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    url = "postgresql://someone:secret@127.0.0.1:1/tables"
    with pytest.raises(MixloomError, match="cannot be reached") as caught:
        migrate.upgrade(Settings(data_dir=tmp_path, database_url=url))
    assert caught.value.code == "database_unreachable"
    assert "127.0.0.1:1" in caught.value.message
    assert "secret" not in caught.value.message
