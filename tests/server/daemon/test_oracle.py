"""The oracle (`benchmarks/oracle.py`) sees what a fault might leave behind.

Each is made by hand in a data directory that was in order.
"""

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.oracle import Trace, anomalies
from server.api.services import Services
from tests.server.conftest import Caller
from tests.server.daemon.conftest import MIXTURE, PLAIN, Life, submit

pytestmark = pytest.mark.databases("sqlite")


@dataclass
class Copied:
    """A data directory that no server works in."""

    data: Path

    def rows(self, statement: str, *values: Any) -> list[dict[str, Any]]:
        with closing(sqlite3.connect(self.data / "mixloom.db", isolation_level=None)) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(statement, values)]


@dataclass(frozen=True)
class Original:
    """What a life of the daemon left, and a job of it."""

    data: Path
    job: str


@pytest.fixture(scope="module")
def kept() -> list[Original]:
    return []


@pytest.fixture
def original(
    kept: list[Original],
    life: Life,
    alice: Caller,
    bob: Caller,
    services: Services,
    tmp_path_factory: pytest.TempPathFactory,
) -> Original:
    """Once a module."""
    if not kept:
        training = {"evaluate_every": 4, "checkpoint_every": 8}
        job = submit(alice, MIXTURE, training=training, validation=0.3)
        submit(bob, PLAIN)
        life.finish()
        life.books.end()
        kept.append(Original(tmp_path_factory.mktemp("original") / "data", job))
        shutil.copytree(services.settings.data_dir, kept[0].data)
    return kept[0]


@pytest.fixture
def copied(original: Original, tmp_path: Path) -> Copied:
    return Copied(Path(shutil.copytree(original.data, tmp_path / "copied")))


def statement(text: str) -> Callable[[Copied], object]:
    return lambda copied: copied.rows(text)


def a_flipped_bit(copied: Copied) -> None:
    file = next(copied.data.glob("adapters/*/adapter_model.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def a_half_written_folder(copied: Copied) -> None:
    (copied.data / "adapters" / "adp_half.1234.tmp").mkdir()


ANOMALIES = {
    "without a live lease": statement("UPDATE jobs SET status = 'running'"),
    "has metrics of": statement("DELETE FROM metrics WHERE step = 3"),
    "is metered": statement("UPDATE tenants SET trained_tokens = trained_tokens + 1 WHERE name = 'alice'"),
    "is not the file": a_flipped_bit,
    "has no row": a_half_written_folder,
    "recovery/": lambda copied: (copied.data / "recovery" / "run_x" / "1-5").mkdir(parents=True),
}


@pytest.mark.parametrize("said", ANOMALIES)
def test_what_must_never_be_is_seen(said: str, copied: Copied) -> None:
    assert anomalies(copied) == []
    ANOMALIES[said](copied)
    found = anomalies(copied)
    assert found
    assert all(said in one for one in found)


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
    part: str, change: str, copied: Copied, original: Original
) -> None:
    before = Trace.of(copied, original.job)
    assert before.unlike(Trace.of(copied, original.job)) == []
    copied.rows(change)
    assert before.unlike(Trace.of(copied, original.job)) == [part]
