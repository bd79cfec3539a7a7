"""Whom a supervisor kills. What comes of it for jobs: `tests/e2e/test_daemons.py`."""

import signal
import socket
import subprocess
import sys
import threading
import time
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


ENDS = """
import os, sys
from pathlib import Path
codes = Path(sys.argv[1])
code, *left = codes.read_text().split()
rest = codes.with_suffix(".rest")
rest.write_text(" ".join(left))
rest.replace(codes)
os._exit(int(code))
"""
"""A daemon that ends at once with the next of the codes in a file, or with 1 when there is none left."""


@pytest.mark.parametrize(
    ("codes", "left", "gives_up"), [("3 3", "3", True), ("1 3 3 0", "", False)], ids=["at first", "later"]
)
def test_a_base_that_cannot_be_loaded_ends_the_server_only_at_its_start(
    codes: str, left: str, gives_up: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "codes"
    file.write_text(codes)
    monkeypatch.setattr(serve.children, "command", lambda *_: [sys.executable, "-c", ENDS, str(file)])
    monkeypatch.setattr(serve, "RESTART_SECONDS", (0.0,))
    told = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    supervisor = Supervisor(Settings(data_dir=tmp_path), [])
    try:
        supervisor.start()
        end = time.monotonic() + LONG_SECONDS
        while file.read_text() != left and time.monotonic() < end:
            time.sleep(0.01)
        assert told.wait(LONG_SECONDS if gives_up else 0) == gives_up
        supervisor.join(LONG_SECONDS)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (file.read_text(), supervisor.gave_up) == (left, gives_up)


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
