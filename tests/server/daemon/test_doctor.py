"""The doctor names each thing that does not fit together, and nothing on a server that is as it should be."""

import json
import os
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from server import doctor
from server.__main__ import main
from server.api.services import Services
from server.db.tables import Adapter, Dataset, Job, RecoveryPoint
from server.orphans import SAFE_SECONDS
from tests.server.conftest import Caller
from tests.server.daemon.conftest import MIXTURE, PLAIN, Life, final_hash, submit

pytestmark = pytest.mark.databases("sqlite")


@pytest.fixture
def at_work(life: Life, alice: Caller, services: Services) -> Services:
    """A server with a job that is done and one that trains, with checkpoints and two recovery points."""
    done = submit(alice, PLAIN, steps=3)
    life.finish()
    assert final_hash(services, done)
    training = submit(alice, MIXTURE)
    life.turn_until(lambda: bool(life.roster.residents) and life.step_of(training) == 11)
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


def execute(services: Services, *statements: str) -> None:
    """With no foreign keys in the way."""
    with closing(sqlite3.connect(services.database.path or "")) as connection:
        for statement in statements:
            assert connection.execute(statement).rowcount > 0
        connection.commit()


def test_on_a_server_at_work_there_is_nothing_to_find(at_work: Services, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.examine(at_work.database, at_work.store) == []
    assert main(["doctor", "--data-dir", str(at_work.settings.data_dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"findings": []}


def test_every_damage_is_named_with_its_row(at_work: Services, capsys: pytest.CaptureFixture[str]) -> None:
    path, had = at_work.store.path, keys(at_work)
    lost, damaged = (path(key) / "adapter_model.safetensors" for key in had["adapters"][:2])
    lost.unlink()
    spoil(damaged)
    shutil.rmtree(path(had["points"][0]))
    spoil(path(had["points"][1]) / "state.safetensors")
    (path(had["datasets"][0]) / "content").unlink()
    spoil(path(had["datasets"][1]) / "content")
    (path(had["jobs"][0]) / "train.safetensors").unlink()
    spoil(path(had["jobs"][1]) / "train.safetensors")
    (base,) = at_work.store.list("bases")
    shutil.rmtree(path(base))
    for name in ("adp_nobodys", "adp_half.1234.tmp"):
        path(f"adapters/{name}").mkdir()
        os.utime(path(f"adapters/{name}"), (time.time() - SAFE_SECONDS - 1,) * 2)
    path("jobs/job_being_written.1234.tmp").mkdir()
    done, training = (key.partition("/")[2] for key in had["jobs"])
    execute(
        at_work,
        "UPDATE daemons SET expires_at = 0",
        f"DELETE FROM runs WHERE job_id = '{done}'",
        f"UPDATE jobs SET adapter_id = 'adp_gone' WHERE id = '{done}'",
        f"DELETE FROM metrics WHERE job_id = '{training}' AND step = 2",
        "UPDATE events SET job_id = 'job_gone' WHERE id = 1",
    )
    assert main(["doctor", "--data-dir", str(at_work.settings.data_dir), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["findings"]
    assert sorted((one["kind"], one["id"]) for one in found if "damaged" not in one["kind"]) == [
        ("adapter_missing", had["adapters"][0].partition("/")[2]),
        ("adapter_row_missing", done),
        ("dataset_missing", had["datasets"][0].partition("/")[2]),
        ("metrics_gap", training),
        ("no_live_lease", training),
        ("orphan", "adapters/adp_half.1234.tmp"),
        ("orphan", "adapters/adp_nobodys"),
        ("recovery_point_missing", had["points"][0].rpartition("-")[2]),
        ("row_without_parent", "events 1"),
        ("run_missing", done),
        ("tokenizer_missing", base.partition("/")[2]),
        ("tokens_missing", done),
    ]
    assert [(one["kind"], one["id"]) for one in found if "damaged" in one["kind"]] == [
        ("adapter_damaged", had["adapters"][1].partition("/")[2]),
        ("dataset_damaged", had["datasets"][1].partition("/")[2]),
        ("recovery_point_damaged", had["points"][1].rpartition("-")[2]),
        ("tokens_damaged", training),
    ]
    assert all(one["message"] for one in found)


def test_where_there_is_no_server_the_doctor_makes_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--data-dir", str(tmp_path / "nothing")]) == 1
    assert "There is no" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()
