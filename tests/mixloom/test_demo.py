"""What the demo does to a folder, and how it fails. That it succeeds, `make demo` and tests/e2e show."""

import os
import subprocess
from pathlib import Path

import pytest

from mixloom.demo.server import MARK, DemoFailed, serving
from tests.e2e.server import wait_for


def test_a_directory_that_no_demo_made_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious").touch()
    with pytest.raises(DemoFailed, match="not made by a demo"), serving(tmp_path):
        pass
    assert (tmp_path / "data" / "precious").exists()


def test_a_demo_that_still_runs_keeps_its_directory(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / MARK).write_text(str(os.getpid()))
    with pytest.raises(DemoFailed, match="Another demo"), serving(tmp_path):
        pass


def test_the_operators_database_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXLOOM_DATABASE_URL", "postgresql://mixloom@127.0.0.1:9/mixloom")
    with serving(tmp_path) as server:
        wait_for((server.data / "mixloom.db").exists, why=server.log.read_text)


def test_a_server_that_cannot_start_is_reported_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXLOOM_DTYPE", "float7")
    with pytest.raises(DemoFailed, match="The server ended"), serving(tmp_path) as server:
        server.wait_until_ready(lambda sentence: None)
    with pytest.raises(subprocess.TimeoutExpired), serving(tmp_path) as server:  # made by a demo: used again
        server.process.wait(0)
    assert server.process.poll() is not None
