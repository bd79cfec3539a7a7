"""The doctor names each thing that does not fit together, and nothing on a server that is as it should be."""

import json
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import get_args

import pytest
from sqlalchemy import text

from server import doctor
from server.__main__ import main
from server.api.app import open_services
from server.api.services import Services
from server.db import migrate, operations, tenants
from server.db.session import Database
from server.db.tables import Adapter, Base, Dataset, Job, RecoveryPoint
from server.orphans import SAFE_SECONDS
from server.settings import Settings
from server.store import sha256_of
from tests.postgresql import PostgreSQL
from tests.server.conftest import ADMIN_KEY, Caller
from tests.server.daemon.conftest import MIXTURE, PLAIN, Life, final_hash, first_page, spoil_index, spoil_table, submit


@pytest.fixture
def at_work(life: Life, alice: Caller, services: Services) -> Services:
    """A server with two jobs that are done and one that trains, checkpoints, two recovery points and a request."""
    done = [submit(alice, PLAIN, steps=3) for _ in range(2)]
    life.finish()
    assert all(final_hash(services, one) for one in done)
    training = submit(alice, MIXTURE)
    life.turn_until(lambda: bool(life.roster.residents) and life.step_of(training) == 11)
    services.store.put("operations/op_asked", lambda folder: None)
    asked = {"tenant_id": alice.tenant_id, "adapter_id": None, "base_hash": "0123abcd", "deadline": time.time()}
    with services.database.write() as session:
        operations.add_sample(session, id_="op_asked", key="operations/op_asked", **asked)  # type: ignore[arg-type]
    return services


def keys(services: Services) -> dict[str, list[str]]:
    """The store's keys of the rows of each table, in the order in which they were made."""
    with services.database.read() as session:
        return {
            "adapters": [one.key for one in session.query(Adapter).order_by(Adapter.created_at)],
            "points": [one.key for one in session.query(RecoveryPoint).order_by(RecoveryPoint.created_at)],
            "datasets": [f"datasets/{one.id}" for one in session.query(Dataset).order_by(Dataset.created_at)],
            "jobs": [one.tokens_key for one in session.query(Job).order_by(Job.number)],
        }


def spoil(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def copy_of(row: Base, **changes: object) -> Base:
    return Base(**{column.name: getattr(row, column.name) for column in Base.__table__.columns} | changes)


def execute(services: Services, *statements: str) -> None:
    """On SQLite with no foreign keys in the way."""
    if services.database.path is None:
        with services.database.write() as session:
            for statement in statements:
                session.execute(text(statement))
        return
    with closing(sqlite3.connect(services.database.path)) as connection:
        for statement in statements:
            assert connection.execute(statement).rowcount > 0
        connection.commit()


def settings_of(services: Services) -> list[str]:
    """As flags."""
    url = services.settings.database_url
    return ["--data-dir", str(services.settings.data_dir), *(["--database-url", url] if url else [])]


def test_on_a_server_at_work_there_is_nothing_to_find(at_work: Services, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.examine(at_work.database, at_work.store) == []
    assert main(["doctor", *settings_of(at_work), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"findings": []}


def test_every_damage_is_named_with_its_row(at_work: Services, capsys: pytest.CaptureFixture[str]) -> None:
    """PostgreSQL lets no row be without its parent, and looks after its own files."""
    of_sqlite = at_work.database.path is not None
    path, had = at_work.store.path, keys(at_work)
    lost, damaged = (path(key) / "adapter_model.safetensors" for key in had["adapters"][:2])
    lost.unlink()
    spoil(damaged)
    shutil.rmtree(path(had["points"][0]))
    spoil(path(had["points"][1]) / "state.safetensors")
    (path(had["datasets"][0]) / "content").unlink()
    spoil(path(had["datasets"][1]) / "content")
    (path(had["jobs"][0]) / "train.safetensors").unlink()
    spoil(path(had["jobs"][2]) / "train.safetensors")
    path("operations/op_asked").rmdir()
    (base,) = at_work.store.list("bases")
    spoil(path(base) / "special.json")
    with at_work.database.write() as session:
        row = session.query(Base).one()
        session.add(copy_of(row, hash="gone", folder_key="bases/gone"))
    for name in ("adp_nobodys", "adp_half.1234.tmp"):
        path(f"adapters/{name}").mkdir()
        os.utime(path(f"adapters/{name}"), (time.time() - SAFE_SECONDS - 1,) * 2)
    path("jobs/job_being_written.1234.tmp").mkdir()
    done, other, training = (key.partition("/")[2] for key in had["jobs"])
    point = had["points"][0].rpartition("-")[2]
    execute(
        at_work,
        f"UPDATE daemons SET expires_at = 0, started_at = started_at - {2 * SAFE_SECONDS}",
        f"DELETE FROM runs WHERE job_id = '{done}'",
        f"UPDATE jobs SET adapter_id = 'adp_gone' WHERE id = '{done}'",
        f"UPDATE jobs SET finished_at = finished_at - {2 * SAFE_SECONDS} WHERE id = '{other}'",
        f"UPDATE recovery_points SET run_id = (SELECT id FROM runs WHERE job_id = '{other}') WHERE id = '{point}'",
        f"DELETE FROM metrics WHERE job_id = '{training}' AND step = 2",
        f"UPDATE metrics SET tokens = tokens + 1 WHERE job_id = '{other}' AND step = 3",
    )
    if of_sqlite:
        execute(at_work, "UPDATE events SET job_id = 'job_gone' WHERE id = 1")
        spoil_index(at_work, "ix_keys_tenant_id")
    assert main(["doctor", *settings_of(at_work), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["findings"]
    assert sorted((one["kind"], one["id"]) for one in found if "damaged" not in one["kind"]) == [
        ("adapter_missing", had["adapters"][0].partition("/")[2]),
        ("adapter_row_missing", done),
        ("dataset_missing", had["datasets"][0].partition("/")[2]),
        ("metrics_differ", other),
        ("metrics_gap", training),
        ("no_live_lease", training),
        ("orphan", "adapters/adp_half.1234.tmp"),
        ("orphan", "adapters/adp_nobodys"),
        ("recovery_point_missing", point),
        ("recovery_point_of_ended_job", point),
        ("request_missing", "op_asked"),
        *([("row_without_parent", "events 1")] if of_sqlite else []),
        ("run_missing", done),
        ("tokenizer_missing", "gone"),
        ("tokens_missing", done),
    ]
    assert [(one["kind"], one["id"]) for one in found if "damaged" in one["kind"]] == [
        ("adapter_damaged", had["adapters"][1].partition("/")[2]),
        *([("database_damaged", "mixloom.db")] if of_sqlite else []),
        ("dataset_damaged", had["datasets"][1].partition("/")[2]),
        ("recovery_point_damaged", had["points"][1].rpartition("-")[2]),
        ("tokenizer_damaged", base.partition("/")[2]),
        ("tokens_damaged", training),
    ]
    assert all(re.search("[.;] [A-Z`i]", one["message"]) for one in found), "what is, and what comes of it or to do"
    of_sqlites_alone = {"row_without_parent", "database_damaged"}
    assert {one["kind"] for one in found} | of_sqlites_alone == set(get_args(doctor.Kind))


def test_the_recovery_point_of_a_job_that_was_cancelled_while_no_daemon_lived_is_as_it_should_be(
    life: Life, new_life: Callable[[], Life], alice: Caller, services: Services
) -> None:
    id_ = submit(alice, PLAIN)
    life.turn_until(lambda: bool(life.roster.residents) and life.step_of(id_) == 6)
    life.books.end()
    assert alice.post(f"/jobs/{id_}/cancel").json()["status"] == "cancelled"
    down = 2 * SAFE_SECONDS
    execute(
        services,
        f"UPDATE jobs SET finished_at = finished_at - {down}",
        f"UPDATE daemons SET started_at = started_at - {2 * down}, heartbeat_at = heartbeat_at - {down}",
    )
    assert doctor.examine(services.database, services.store) == []
    again = new_life()
    assert doctor.examine(services.database, services.store) == [], "it has not had its first turn"
    again.turn()
    with services.database.read() as session:
        assert not session.query(RecoveryPoint).all()


def every_file(services: Services) -> list[tuple[str, Path]]:
    """With the kind of what is found when it is damaged: all but what was asked of `/generate`."""
    kinds = {
        "adapters": "adapter_damaged",
        "bases": "tokenizer_damaged",
        "datasets": "dataset_damaged",
        "jobs": "tokens_damaged",
        "recovery": "recovery_point_damaged",
        "uploads": "adapter_damaged",
    }
    root = services.settings.data_dir
    files = [path for prefix in kinds for path in root.glob(f"{prefix}/**/*") if path.is_file()]
    return [(kinds[path.relative_to(root).parts[0]], path) for path in files]


@pytest.mark.databases("sqlite")
def test_one_bit_of_any_file_is_found_and_so_is_a_file_too_many(at_work: Services, alice: Caller) -> None:
    (key, *_) = keys(at_work)["adapters"]
    folder = at_work.store.path(key)
    parts = {"config": folder / "adapter_config.json", "weights": folder / "adapter_model.safetensors"}
    sent = alice.post("/adapters", files={part: (path.name, path.read_bytes()) for part, path in parts.items()})
    assert sent.status_code == 201, sent.text
    files = every_file(at_work)
    names = {path.name for _, path in files}
    assert names >= {"README.md", "adapter_config.json", "rows.jsonl", "special.json", "tokenizer.json", "run.json"}
    for kind, path in files:
        whole = path.read_bytes()
        spoil(path)
        assert [one.kind for one in doctor.examine_files(at_work.database, at_work.store)] == [kind], path
        path.write_bytes(whole)
    for kind, folder in {(kind, path.parent) for kind, path in files}:
        (folder / "one.more").touch()
        assert [one.kind for one in doctor.examine_files(at_work.database, at_work.store)] == [kind], folder
        (folder / "one.more").unlink()
    assert doctor.examine_files(at_work.database, at_work.store) == []


@pytest.mark.databases("sqlite")
def test_of_rows_of_an_older_version_the_files_are_compared_that_these_know(at_work: Services) -> None:
    """Which have no manifest, but those of recovery points."""
    for table, column in (
        ("adapters", "manifest"),
        ("bases", "manifest"),
        ("datasets", "manifest"),
        ("jobs", "tokens_manifest"),
    ):
        execute(at_work, f"UPDATE {table} SET {column} = NULL")
    assert doctor.examine_files(at_work.database, at_work.store) == []
    found = set()
    for kind, path in every_file(at_work):
        whole = path.read_bytes()
        spoil(path)
        if findings := doctor.examine_files(at_work.database, at_work.store):
            assert [one.kind for one in findings] == [kind], path
            found.add(path.name)
        path.write_bytes(whole)
    assert found == {"adapter_model.safetensors", "content", "state.safetensors", "run.json"}


NOTHING = {
    column.name: {str: "", int: 0, float: 0.0, object: {}}[column.type.python_type]
    for column in Base.__table__.columns
    if column.name not in ("hash", "folder_key")
}


def spoil_head(path: Path) -> None:
    path.write_bytes(b"garbage " * 8 + path.read_bytes()[64:])


def spoil_format(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[47] = 77
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("harm", "others"),
    [
        pytest.param(lambda path: spoil_table(path, "jobs"), {"tokenizer_missing"}, id="jobs"),
        pytest.param(lambda path: spoil_table(path, "alembic_version"), {"tokenizer_missing"}, id="the version"),
        pytest.param(spoil_head, set(), id="head"),
        pytest.param(spoil_format, set(), id="the format of its schema"),
        pytest.param(cut_off, set(), id="half"),
    ],
)
def test_a_damaged_database_is_found_beside_all_that_can_still_be_read(
    harm: Callable[[Path], None], others: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(data_dir=tmp_path)
    migrate.upgrade(settings)
    database = Database(settings.database)
    with database.write() as session:
        session.add(Base(hash="gone", folder_key="bases/gone", **NOTHING))
    assert database.path is not None
    first_page(database.path, "bases")  # all is in the file
    harm(database.path)
    assert main(["doctor", "--data-dir", str(tmp_path), "--json"]) == 1
    said = capsys.readouterr()
    assert said.err == ""
    assert {one["kind"] for one in json.loads(said.out)["findings"]} == {"database_damaged"} | others


NOT_JSON = "UPDATE jobs SET training = replace(training, '{', '[')"
NOT_TEXT = "UPDATE jobs SET name = CAST(x'ff41' AS TEXT)"


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize(
    ("harm", "ids"),
    [(NOT_JSON, {"jobs 1", "jobs 2", "jobs 3", "mixloom.db"}), (NOT_TEXT, {"mixloom.db"})],
    ids=["no JSON", "no text"],
)
def test_a_value_that_cannot_be_read_is_found_and_hides_nothing_of_other_tables(
    harm: str, ids: set[str], at_work: Services, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(at_work.store.path(keys(at_work)["adapters"][0]))
    execute(at_work, harm)
    assert main(["doctor", *settings_of(at_work), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["findings"]
    assert {one["kind"] for one in found} == {"database_damaged", "adapter_missing"}
    assert {one["id"] for one in found if one["kind"] == "database_damaged"} == ids
    assert main(["backup", str(tmp_path / "copy"), *settings_of(at_work)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_number_that_nobody_can_read_is_found_in_the_database_that_has_it(
    at_work: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    execute(at_work, f"UPDATE datasets SET columns = '[{'1' * 5000}]'")
    assert main(["doctor", *settings_of(at_work), "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)["findings"]
    assert found["id"] == ("mixloom.db" if at_work.database.path else "PostgreSQL")
    assert ("SQLite" in found["message"]) == (at_work.database.path is not None)


def test_what_postgresql_cannot_read_is_found_beside_all_that_it_can(
    postgresql: PostgreSQL, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(data_dir=tmp_path / "data", database_url=postgresql.new_database(), admin_key=ADMIN_KEY)
    flags = ["--data-dir", str(settings.data_dir), "--database-url", str(settings.database_url)]
    open_services(settings)
    with Database(settings.database).write() as session:
        session.add(Base(hash="gone", folder_key="bases/gone", **NOTHING))
        tenant = tenants.add_tenant(session, "alice", 1.0)
        asked = {"tenant_id": tenant.id, "adapter_id": None, "base_hash": "gone", "deadline": time.time()}
        operations.add_sample(session, id_="op_asked", key="operations/op_asked", **asked)
    postgresql.spoil_table(str(settings.database.database), "bases")
    assert main(["doctor", *flags, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["findings"]
    assert {one["kind"] for one in found} == {"database_damaged", "request_missing"}
    assert "invalid page" in found[0]["message"]
    assert main(["backup", str(tmp_path / "copy"), *flags]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.databases("postgresql")
def test_files_that_take_long_to_read_hold_up_no_transaction(
    life: Life, alice: Caller, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL would end it."""
    submit(alice, PLAIN, steps=1)
    life.finish()
    monkeypatch.setattr("server.db.session.IDLE_SECONDS", 1)

    def slowly(path: Path) -> str:
        time.sleep(1.5 if path.name == "adapter_model.safetensors" else 0)
        return sha256_of(path)

    monkeypatch.setattr("server.store.sha256_of", slowly)
    assert doctor.examine_files(Database(services.settings.database), services.store) == []


def test_where_there_is_no_server_the_doctor_makes_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--data-dir", str(tmp_path / "nothing")]) == 1
    assert "There is no" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "mixloom.db").touch()
    for arguments in (["doctor"], ["backup", str(tmp_path / "copy")]):
        assert main([*arguments, "--data-dir", str(tmp_path)]) == 1
        assert "which is empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mixloom.db"]
