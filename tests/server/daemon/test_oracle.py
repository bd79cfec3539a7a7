"""The oracle (`benchmarks/oracle.py`) sees what a fault might leave behind.

Each is made by hand in a data directory that was in order.
"""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Table, insert, select

from benchmarks.oracle import Trace, anomalies
from server.api.services import Services
from server.db.tables import Base
from tests.server.daemon.conftest import MIXTURE, PLAIN, OnDisk, submit


@dataclass(frozen=True)
class Original:
    """What a life of the daemon left, and a job of it."""

    data: Path
    rows: dict[Table, list[dict[str, Any]]]
    job: str


@pytest.fixture(scope="module")
def kept() -> list[Original]:
    return []


@pytest.fixture
def original(
    kept: list[Original], services: Services, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Original:
    """It is made once a module, and lies in each test's own data directory and database."""
    data = services.settings.data_dir
    if kept:
        shutil.copytree(kept[0].data, data, dirs_exist_ok=True)
        with services.database.write() as session:
            for table, rows in kept[0].rows.items():
                session.execute(insert(table), rows)
        return kept[0]
    life, alice, bob = (request.getfixturevalue(name) for name in ("life", "alice", "bob"))
    training = {"evaluate_every": 4, "checkpoint_every": 8}
    job = submit(alice, MIXTURE, training=training, validation=0.3)
    submit(bob, PLAIN)
    life.finish()
    life.books.end()
    copy = tmp_path_factory.mktemp("original") / "data"
    shutil.copytree(data, copy, ignore=shutil.ignore_patterns("mixloom.db*"))
    with services.database.read() as session:
        found = {table: session.execute(select(table)).mappings() for table in Base.metadata.sorted_tables}
        rows = {table: [dict(row) for row in all_] for table, all_ in found.items()}
    kept.append(Original(copy, {table: some for table, some in rows.items() if some}, job))
    return kept[0]


@pytest.fixture
def copied(original: Original, services: Services) -> OnDisk:
    return OnDisk(services.settings.data_dir, services.settings.database_url)


def statement(text: str) -> Callable[[OnDisk], object]:
    return lambda copied: copied.rows(text)


def a_flipped_bit(copied: OnDisk) -> None:
    file = next(copied.data.glob("adapters/*/adapter_model.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def a_half_written_folder(copied: OnDisk) -> None:
    (copied.data / "adapters" / "adp_half.1234.tmp").mkdir()


def an_expired_lease(copied: OnDisk) -> None:
    copied.rows("UPDATE jobs SET status = 'running'")
    copied.rows("UPDATE daemons SET ended_at = NULL, expires_at = ?", time.time() + 30)
    copied.rows("UPDATE runs SET lease_epoch = (SELECT max(epoch) FROM daemons)")
    assert anomalies(copied) == []
    copied.rows("UPDATE daemons SET expires_at = ?", time.time() - 30)


ANOMALIES = {
    "without a live lease": statement("UPDATE jobs SET status = 'running'"),
    "is running without a live lease": an_expired_lease,
    "has metrics of": statement("DELETE FROM metrics WHERE step = 3"),
    "counts": statement("UPDATE metrics SET tokens = tokens + 1"),
    "is metered": statement("UPDATE counters SET trained_tokens = trained_tokens + 1"),
    "is not the file": a_flipped_bit,
    "has no row": a_half_written_folder,
    "recovery/": lambda copied: (copied.data / "recovery" / "run_x" / "1-5").mkdir(parents=True),
}


@pytest.mark.parametrize("said", ANOMALIES)
def test_what_must_never_be_is_seen(said: str, copied: OnDisk) -> None:
    assert anomalies(copied) == []
    ANOMALIES[said](copied)
    found = anomalies(copied)
    assert found
    assert all(said in one for one in found)


def test_what_a_dead_daemon_has_half_done_may_lie_there_for_a_while(copied: OnDisk) -> None:
    a_half_written_folder(copied)
    assert anomalies(copied, uncollected_seconds=60.0) == []
    os.utime(copied.data / "adapters" / "adp_half.1234.tmp", (time.time() - 61.0,) * 2)
    assert len(anomalies(copied, uncollected_seconds=60.0)) == 1


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("job", "UPDATE runs SET cost_charged = cost_charged + 1"),
        ("metrics", "UPDATE metrics SET grad_norm = grad_norm * 1.0000001 WHERE step = 2"),
        ("expert_loads", "UPDATE expert_loads SET step = step + 1"),
        ("adapters", "UPDATE adapters SET sha256 = 'other'"),
    ],
)
def test_a_job_that_ended_otherwise_is_told_by_what_it_left(
    part: str, change: str, copied: OnDisk, original: Original
) -> None:
    before = Trace.of(copied, original.job)
    assert before.unlike(Trace.of(copied, original.job)) == []
    copied.rows(change)
    assert before.unlike(Trace.of(copied, original.job)) == [part]
