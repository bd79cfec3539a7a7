"""The oracle sees what a fault might leave behind; each is made by hand in a data directory that was in order."""

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.oracle import Trace, anomalies
from tests.base_folder import write_tiny_base
from tests.e2e.disturbed import SHORT, left_by, submit_all
from tests.e2e.server import Server


@dataclass
class Copied:
    """A data directory that no server works in."""

    data: Path

    def rows(self, statement: str, *values: Any) -> list[dict[str, Any]]:
        with closing(sqlite3.connect(self.data / "mixloom.db", isolation_level=None)) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(statement, values)]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """What a server leaves, and a job of it."""
    server = Server(tmp_path_factory.mktemp("oracle"), write_tiny_base(tmp_path_factory.mktemp("base")))
    try:
        jobs = submit_all(server.start(), SHORT)
        left_by(server, jobs)
        server.stop()
        yield server.data, jobs[0]
    finally:
        server.end()


@pytest.fixture
def copied(original: tuple[Path, str], tmp_path: Path) -> Copied:
    return Copied(Path(shutil.copytree(original[0], tmp_path / "data")))


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
    part: str, change: str, copied: Copied, original: tuple[Path, str]
) -> None:
    before = Trace.of(copied, original[1])
    assert before.unlike(Trace.of(copied, original[1])) == []
    copied.rows(change)
    assert before.unlike(Trace.of(copied, original[1])) == [part]
