"""A backup is a data directory: made in mid-run, again made from what it has, and gone on from elsewhere."""

import shutil
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from sqlalchemy import Connection, Engine, event, select, text

from engine.base_model import BaseModel
from server import doctor
from server.api.app import open_services
from server.api.services import Services
from server.backup import DATABASE, KEY, LOCK, back_up, restore
from server.db import daemons, events, migrate
from server.db.copying import need_empty
from server.db.session import Database
from server.db.stores import MARK
from server.db.tables import Counter, Job, Table
from server.errors import MixloomError
from server.faults import Fault, arm
from server.settings import Settings
from server.store import LocalStore
from tests.postgresql import PostgreSQL
from tests.server.conftest import ADMIN_KEY, Caller
from tests.server.daemon.conftest import MIXTURE, PLAIN, Life, break_rows, final_hash, job, spoil_table, steps, submit

REVISIONS = migrate._revisions(str(Path(migrate.migrations.__file__ or "").parent))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return tmp_path / "backup"


@pytest.fixture(params=["sqlite", "postgresql"])
def elsewhere(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """Where a backup is restored: a folder and a database of which nothing is there yet."""
    url = None if request.param == "sqlite" else request.getfixturevalue("postgresql").new_database()
    return Settings(data_dir=tmp_path / "elsewhere", database_url=url, admin_key=ADMIN_KEY)


def test_the_original_is_destroyed_and_elsewhere_each_job_ends_with_the_bytes_it_would_have_had(
    life: Life, alice: Caller, services: Services, copy: Path, elsewhere: Settings, frozen: BaseModel, folder: Path
) -> None:
    undisturbed = []
    for adapter in (MIXTURE, PLAIN):
        id_ = submit(alice, adapter)
        life.finish()
        undisturbed.append(final_hash(services, id_))
    ids = [submit(alice, adapter) for adapter in (MIXTURE, PLAIN)]
    life.turn_until(lambda: min(job(services, id_).step for id_ in ids) == 6)
    first = back_up(services.settings, copy)
    assert first.new == first.folders > 0
    life.turn_until(lambda: min(job(services, id_).step for id_ in ids) == 11)
    second = back_up(services.settings, copy)
    assert 0 < second.new < second.folders
    assert first.findings == second.findings == []
    life.finish()  # what the original does after that is in no backup
    shutil.rmtree(services.settings.data_dir)

    assert doctor.examine(Database(Settings(data_dir=copy).database), LocalStore(copy)) == []
    assert restore(elsewhere, copy).findings == []
    assert not (elsewhere.data_dir / LOCK).exists(), "it is no backup"
    restored = open_services(elsewhere)
    assert {job(restored, id_).status for id_ in ids} == {"queued"}, "nobody lives there"
    assert [job(restored, id_).step for id_ in ids] == [11, 11]
    Life(restored, frozen, folder).finish()
    assert [final_hash(restored, id_) for id_ in ids] == undisturbed
    assert [steps(restored, id_) for id_ in ids] == [list(range(1, 13))] * 2
    assert doctor.examine(restored.database, restored.store) == []


def every_row(database: Database) -> dict[str, list[dict[str, Any]]]:
    """By table, in order of its key."""
    with database.look() as connection:
        return {
            table.name: [dict(row) for row in connection.execute(select(table).order_by(*table.primary_key)).mappings()]
            for table in Table.metadata.sorted_tables
        }


def jobs_without_error(database: Database) -> int:
    """As SQL sees it, to which the `null` of JSON is not nothing."""
    with database.look() as connection:
        return connection.execute(text("SELECT count(*) FROM jobs WHERE error IS NULL")).scalar_one()


def test_a_database_that_is_restored_has_every_row_as_it_was_and_numbers_new_ones_after_them(
    life: Life, alice: Caller, services: Services, copy: Path, elsewhere: Settings
) -> None:
    submit(alice, MIXTURE, steps=3, validation=0.3, metadata={"why": "\u2713", "then": "\\u0041"})
    broken = submit(alice, PLAIN, steps=3)
    break_rows(services, broken, 0)
    life.finish()
    life.books.end()
    with services.database.write() as session:
        events.record(session, session.get_one(Job, broken), "noted", "of the largest number", {"number": 2**53 + 1})
    before = every_row(services.database)
    assert {name for name, rows in before.items() if rows} >= {
        "adapters",
        "daemons",
        "events",
        "expert_loads",
        "metrics",
    }
    back_up(services.settings, copy)
    restore(elsewhere, copy)
    restored = Database(elsewhere.database)
    assert every_row(restored) == before
    assert jobs_without_error(restored) == jobs_without_error(services.database) == 1
    with restored.write() as session:
        job = session.get_one(Job, broken)
        events.record(session, job, "noted", "a new row", {})
        epoch = daemons.begin_life(session, pid=1, supervisor=None, name=None, lease_seconds=1).epoch
    after = every_row(restored)
    assert epoch == before["daemons"][-1]["epoch"] + 1
    assert after["events"][-1]["id"] == before["events"][-1]["id"] + 1


@pytest.mark.databases("postgresql")
def test_a_backup_is_of_one_moment_whoever_writes_meanwhile(services: Services, admin: Caller, copy: Path) -> None:
    came = []

    def come(_connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        """With a key, which is read next, when the tenants have been read."""
        if statement.startswith("SELECT keys.") and not came:
            came.append("late")
            assert admin.post("/admin/tenants", json={"name": "late"}).status_code == 201

    assert admin.post("/admin/tenants", json={"name": "early"}).status_code == 201
    event.listen(Engine, "before_cursor_execute", come)
    try:
        back_up(services.settings, copy)
    finally:
        event.remove(Engine, "before_cursor_execute", come)
    tables = every_row(Database(Settings(data_dir=copy).database))
    assert came
    assert [tenant["name"] for tenant in tables["tenants"]] == ["early"]
    assert len(tables["keys"]) == 1


def test_a_backup_of_an_older_version_is_restored_as_of_this_one(elsewhere: Settings, copy: Path) -> None:
    copy.mkdir()
    with Database(Settings(data_dir=copy).database).write() as session:
        command.upgrade(migrate._config(session.connection()), REVISIONS[-1])
        session.execute(text("INSERT INTO tenants VALUES ('ten_1', 'old', 1, 0, false, 1, NULL)"))
    restore(elsewhere, copy)
    with migrate.open_current(elsewhere).read() as session:
        assert session.get_one(Counter, ("ten_1", 1)).trained_tokens == 0


def test_what_is_gone_from_the_original_goes_from_the_backup_and_what_is_damaged_is_named(
    life: Life, alice: Caller, services: Services, copy: Path
) -> None:
    gone, kept = submit(alice, PLAIN, steps=2), submit(alice, PLAIN, steps=2)
    life.finish()
    back_up(services.settings, copy)
    assert alice.delete(f"/jobs/{gone}").status_code == 200
    adapter = services.store.path(services.store.list("adapters")[0]) / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1] + b"x")
    shutil.rmtree(copy / "adapters")
    again = back_up(services.settings, copy)
    assert (again.new, again.removed) == (1, 1), "the adapter; the job's rows"
    assert [finding.kind for finding in again.findings] == ["adapter_damaged"]
    shutil.rmtree(services.store.path(f"jobs/{kept}"))
    assert {finding.kind for finding in back_up(services.settings, copy).findings} == {"adapter_damaged"}
    shutil.rmtree(copy / "jobs")
    found = back_up(services.settings, copy).findings
    assert {finding.kind for finding in found} == {"adapter_damaged", "tokens_missing"}


def test_what_a_backup_that_was_killed_leaves_and_folders_of_runs_that_have_ended_go_with_the_next(
    life: Life, alice: Caller, services: Services, copy: Path
) -> None:
    id_ = submit(alice, PLAIN)
    life.turn_until(lambda: job(services, id_).step == 6)
    back_up(services.settings, copy)
    copies = LocalStore(copy)
    (of_run,) = copies.children("recovery")
    points = copies.children(of_run)
    assert points
    copies.path("adapters/adp_half.1234.tmp").mkdir()
    life.finish()
    assert back_up(services.settings, copy).removed == len(points) + 1, "they and the job's rows"
    assert copies.children("adapters") == services.store.list("adapters")
    assert copies.children("recovery") == []


@pytest.mark.databases("sqlite")
def test_a_damaged_database_does_not_take_the_place_of_its_backup(services: Services, copy: Path) -> None:
    back_up(services.settings, copy)
    before = (copy / DATABASE).read_bytes()
    assert services.database.path is not None
    spoil_table(services.database.path, "events")
    with pytest.raises(MixloomError, match="is damaged") as caught:
        back_up(services.settings, copy)
    assert caught.value.code == "database_damaged"
    assert (copy / DATABASE).read_bytes() == before
    assert not list(copy.glob(f"{DATABASE}.new*"))


def test_a_backup_that_does_not_fit_leaves_the_one_before(
    life: Life, alice: Caller, services: Services, copy: Path, armed: Path
) -> None:
    submit(alice, PLAIN, steps=2)
    back_up(services.settings, copy)
    before = every_row(Database(Settings(data_dir=copy).database))
    submit(alice, PLAIN, steps=2)
    arm(armed, Fault(point="put.written", kind="ENOSPC", about="jobs"))
    with pytest.raises(MixloomError, match="fault at") as caught:
        back_up(services.settings, copy)
    assert caught.value.code == "not_copied"
    assert every_row(Database(Settings(data_dir=copy).database)) == before
    assert not list(copy.glob(f"{DATABASE}.new*"))
    assert back_up(services.settings, copy).findings == []
    assert len(every_row(Database(Settings(data_dir=copy).database))["jobs"]) == 2


def test_of_two_backups_at_once_in_one_folder_the_second_is_refused_and_the_first_is_whole(
    life: Life, alice: Caller, services: Services, copy: Path
) -> None:
    submit(alice, PLAIN, steps=2)
    life.finish()
    refused = []

    def come(_connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        """When the first has its tables and looks for what they name."""
        if statement.startswith("SELECT adapters.") and not refused:
            refused.append("")
            submit(alice, PLAIN, steps=2)
            with pytest.raises(MixloomError, match="wait for that one's end") as caught:
                back_up(services.settings, copy)
            refused.append(caught.value.code)

    event.listen(Engine, "before_cursor_execute", come)
    try:
        first = back_up(services.settings, copy)
    finally:
        event.remove(Engine, "before_cursor_execute", come)
    assert refused[1:] == ["backup_at_work"]
    assert first.findings == []
    tables = Database(Settings(data_dir=copy).database)
    assert len(every_row(tables)["jobs"]) == 1
    assert doctor.examine(tables, LocalStore(copy)) == []
    assert back_up(services.settings, copy).new == 2, "the rows of the job that came meanwhile, and its data set"


def test_of_a_folder_that_is_half_erased_when_its_turn_comes_no_half_stays(
    life: Life, alice: Caller, services: Services, copy: Path
) -> None:
    submit(alice, PLAIN, steps=2)
    life.finish()
    folder = services.store.path(services.store.list("adapters")[0])
    erased = []

    def erase(_connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        """When the backup has its tables, down to a last file."""
        if statement.startswith("SELECT adapters.") and not erased:
            erased.append(folder)
            assert alice.delete(f"/adapters/{folder.name}").status_code == 200
            folder.mkdir()
            (folder / "adapter_config.json").touch()

    event.listen(Engine, "before_cursor_execute", erase)
    try:
        assert back_up(services.settings, copy).findings == []
    finally:
        event.remove(Engine, "before_cursor_execute", erase)
    assert erased
    assert LocalStore(copy).children("adapters") == []


def test_a_folder_of_which_the_backup_has_only_a_part_is_copied_again(
    life: Life, alice: Caller, services: Services, copy: Path
) -> None:
    submit(alice, PLAIN, steps=2)
    life.finish()
    back_up(services.settings, copy)
    lost = LocalStore(copy).path(services.store.list("adapters")[0]) / "adapter_config.json"
    lost.unlink()
    assert back_up(services.settings, copy).findings == []
    assert lost.is_file()


def test_a_first_backup_that_did_not_fit_is_taken_up_again(
    life: Life, alice: Caller, services: Services, copy: Path, armed: Path
) -> None:
    submit(alice, PLAIN, steps=2)
    arm(armed, Fault(point="put.written", kind="ENOSPC", about="jobs"))
    with pytest.raises(MixloomError, match="fault at"):
        back_up(services.settings, copy)
    assert back_up(services.settings, copy).findings == []


BACKUP_THAT_DIES = """
import os, sys
from pathlib import Path
from server.backup import back_up
from server.settings import Settings

opened = []

def die(event, arguments):
    if opened:
        os._exit(9)
    if event == "open" and str(arguments[0]).startswith(sys.argv[3]) and arguments[2] & os.O_TRUNC:
        opened.append(arguments)

sys.addaudithook(die)
back_up(Settings(data_dir=sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("elsewhere", ["sqlite"], indirect=True)
@pytest.mark.parametrize("name", [KEY, MARK])
def test_a_backup_that_is_killed_while_it_writes_a_private_file_leaves_the_one_before_it(
    name: str, services: Services, copy: Path, elsewhere: Settings
) -> None:
    """It dies at its first step after the file is opened."""
    settings = services.settings
    (settings.data_dir / KEY).write_text("the operator's")
    back_up(settings, copy)
    arguments = (str(settings.data_dir), str(copy), str(copy / name))
    done = subprocess.run([sys.executable, "-c", BACKUP_THAT_DIES, *arguments])
    assert done.returncode == 9
    assert restore(elsewhere, copy).findings == []
    for private in (KEY, MARK):
        assert (elsewhere.data_dir / private).read_text() == (settings.data_dir / private).read_text()
        assert stat.S_IMODE((elsewhere.data_dir / private).stat().st_mode) == 0o600
    open_services(elsewhere)
    back_up(settings, copy)
    assert not list(copy.glob("*.new*"))


def nowhere(settings: Settings, folder: Path) -> None:
    restore(settings.model_copy(update={"data_dir": folder / "new"}), folder / "nothing")


def into_a_folder_that_is_used(settings: Settings, folder: Path) -> None:
    restore(settings, folder)


def of_an_empty_file(settings: Settings, folder: Path) -> None:
    folder.mkdir()
    (folder / DATABASE).touch()
    restore(settings.model_copy(update={"data_dir": folder / "new"}), folder)


def into_itself(settings: Settings, folder: Path) -> None:
    back_up(settings, settings.data_dir / ".." / settings.data_dir.name)


def into_a_file(settings: Settings, folder: Path) -> None:
    folder.write_text("")
    back_up(settings, folder)


def into_a_folder_below_a_file(settings: Settings, folder: Path) -> None:
    folder.write_text("")
    back_up(settings, folder / "backup")


def into_a_database_that_is_away(settings: Settings, folder: Path) -> None:
    back_up(settings, folder)
    url = "postgresql://someone:secret@127.0.0.1:1/tables"
    restore(settings.model_copy(update={"data_dir": folder / "new", "database_url": url}), folder)


def over_something_else(settings: Settings, folder: Path) -> None:
    (folder / "letters").mkdir(parents=True)
    back_up(settings, folder)


def of_an_older_version(settings: Settings, folder: Path) -> None:
    newest, *_, first = REVISIONS
    set_revision(settings, first)
    try:
        back_up(settings, folder)
    finally:
        set_revision(settings, newest)


def of_a_newer_version(settings: Settings, folder: Path) -> None:
    back_up(settings, folder)
    set_revision(Settings(data_dir=folder), "from the future")
    restore(settings.model_copy(update={"data_dir": folder / "new", "database_url": None}), folder)


def set_revision(settings: Settings, revision: str) -> None:
    with Database(settings.database).write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})


@pytest.mark.parametrize(
    ("wish", "code", "says"),
    [
        (nowhere, "no_database", "nothing"),
        (into_a_folder_that_is_used, "data_dir_not_empty", "Move what is in it away"),
        (of_an_empty_file, "no_database", "There is no mixloom.db"),
        (into_itself, "not_a_backup", "the data directory itself"),
        (into_a_file, "not_copied", "Not a directory"),
        (into_a_folder_below_a_file, "not_copied", "Not a directory"),
        (over_something_else, "not_a_backup", "is not empty"),
        (of_an_older_version, "other_version", "mixloom db upgrade"),
        (into_a_database_that_is_away, "database_unreachable", "cannot be reached"),
        (of_a_newer_version, "database_too_new", "newer version"),
    ],
)
def test_what_cannot_be_copied_is_refused_with_what_to_do(
    wish: Callable[[Settings, Path], None], code: str, says: str, services: Services, copy: Path
) -> None:
    with pytest.raises(MixloomError, match=says) as caught:
        wish(services.settings, copy)
    assert caught.value.code == code
    assert "secret" not in caught.value.message


@pytest.mark.databases("postgresql")
def test_a_database_that_has_rows_gets_no_others(services: Services, alice: Caller, copy: Path) -> None:
    back_up(services.settings, copy)
    again = services.settings.model_copy(update={"data_dir": copy.with_name("elsewhere")})
    before = every_row(services.database)
    with pytest.raises(MixloomError, match="has rows already") as caught:
        restore(again, copy)
    assert caught.value.code == "database_not_empty"
    assert every_row(services.database) == before
    assert not again.data_dir.exists(), "with an empty database the same command works"


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("elsewhere", ["postgresql"], indirect=True)
def test_a_database_on_which_a_server_was_only_started_counts_as_empty(
    services: Services, alice: Caller, copy: Path, elsewhere: Settings, tmp_path: Path
) -> None:
    back_up(services.settings, copy)
    open_services(elsewhere.model_copy(update={"data_dir": tmp_path / "started"}))
    restore(elsewhere, copy)
    assert every_row(Database(elsewhere.database)) == every_row(services.database)
    open_services(elsewhere)


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("elsewhere", ["postgresql"], indirect=True)
def test_an_older_database_that_has_rows_stays_as_it_is(services: Services, copy: Path, elsewhere: Settings) -> None:
    back_up(services.settings, copy)
    with Database(elsewhere.database).write() as session:
        command.upgrade(migrate._config(session.connection()), REVISIONS[-1])
        session.execute(text("INSERT INTO tenants VALUES ('ten_1', 'old', 1, 0, false, 1, NULL)"))
    with pytest.raises(MixloomError, match="has rows already"):
        restore(elsewhere, copy)
    assert migrate._revision(Database(elsewhere.database)) == REVISIONS[-1]


@pytest.mark.databases("postgresql")
def test_the_reading_is_over_before_the_copy_is_written_to_the_disk(
    services: Services, alice: Caller, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long that takes: PostgreSQL ends a transaction whose owner says nothing."""
    monkeypatch.setattr("server.db.session.IDLE_SECONDS", 1)

    def take_long(connection: Connection) -> None:
        if connection.dialect.name == "sqlite":
            time.sleep(2)

    event.listen(Engine, "commit", take_long)
    try:
        assert back_up(services.settings, copy).findings == []
    finally:
        event.remove(Engine, "commit", take_long)


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("elsewhere", ["postgresql"], indirect=True)
def test_a_database_in_which_nothing_may_be_made_is_named(
    services: Services, copy: Path, elsewhere: Settings, postgresql: PostgreSQL
) -> None:
    back_up(services.settings, copy)
    name = str(elsewhere.database.database)
    with Database(elsewhere.database).write() as session:
        session.execute(text(f"CREATE ROLE {name}_guest LOGIN"))
    url = elsewhere.database.set(username=f"{name}_guest").render_as_string(hide_password=False)
    with pytest.raises(MixloomError, match="permission denied for schema") as caught:
        restore(elsewhere.model_copy(update={"database_url": url}), copy)
    assert caught.value.code == "not_copied"


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("elsewhere", ["postgresql"], indirect=True)
def test_rows_that_a_damaged_backup_has_and_no_database_takes_are_named(
    services: Services, alice: Caller, copy: Path, elsewhere: Settings
) -> None:
    """SQLite does not look at what it is given with `foreign_keys` off, as somebody's own program may have it."""
    back_up(services.settings, copy)
    with closing(sqlite3.connect(copy / DATABASE)) as connection:
        connection.execute("UPDATE keys SET tenant_id = 'nobody'")
        connection.commit()
    with pytest.raises(MixloomError, match="violates foreign key") as caught:
        restore(elsewhere, copy)
    assert caught.value.code == "rows_refused"
    need_empty(Database(elsewhere.database))
