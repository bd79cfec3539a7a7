"""Whom a supervisor kills. What comes of it for jobs: `tests/e2e/test_daemons.py`."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from server import serve
from server.serve import Supervisor
from server.settings import Settings

KILLED = -signal.SIGKILL
LONG_SECONDS = 60.0


@pytest.mark.parametrize(
    ("start_seconds", "life", "ends"),
    [
        pytest.param(0.5, "time.sleep(5)", KILLED, id="stopped before its first byte"),
        pytest.param(LONG_SECONDS, "beat(); time.sleep(5)", KILLED, id="stopped after it"),
        pytest.param(LONG_SECONDS, "time.sleep(1); beat(); os._exit(0)", 0, id="slow to start"),
    ],
)
def test_a_child_of_which_nothing_is_heard_for_too_long_is_killed(
    start_seconds: float, life: str, ends: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "START_SECONDS", start_seconds)
    monkeypatch.setattr(serve, "SILENT_LEASES", 0.25)
    supervisor = Supervisor(Settings(data_dir=tmp_path, lease_seconds=2), [])
    ours, theirs = socket.socketpair()
    program = f"import os, time; beat = lambda: os.write(0, b'.'); {life}"
    with ours, subprocess.Popen([sys.executable, "-c", program], stdin=theirs.fileno()) as child:
        theirs.close()
        supervisor._watch(child, ours)
    assert child.returncode == ends


def test_who_waits_for_a_daemon_that_nobody_has_asked_to_end_asks_it(tmp_path: Path) -> None:
    """As when the API ends by an error of its own."""
    supervisor = Supervisor(
        Settings(data_dir=tmp_path), ["--data-dir", str(tmp_path), "--base", str(tmp_path / "none")]
    )
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # which a supervisor sends where there is no base
    try:
        supervisor.start()
        supervisor.join(LONG_SECONDS)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not supervisor.gave_up, "it did not get as far as the base"
