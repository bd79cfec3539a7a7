"""One daemon at a time: whoever holds the lock dies with it, and an orphan that does not die is ended."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from server import children
from server.daemon import lock

HOLD = """
import sys, time
from pathlib import Path
from server.daemon.lock import hold
kept = hold(Path(sys.argv[1]), supervised=sys.argv[3:] == ["supervised"])
print("held", flush=True)
time.sleep(60)
"""
PARENT = """
import subprocess, sys
hold, path, *words = sys.argv[1:]
child = subprocess.Popen([sys.executable, "-c", hold, path, "daemon", *words], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
"""
"""Ends at once, and leaves a holder without a parent."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "daemon.lock"


@pytest.fixture
def holder(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), "daemon", "supervised"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


@contextmanager
def left_alone(path: Path, *words: str) -> Iterator[int]:
    """The pid of a holder whose parent is gone, stopped so that it cannot end itself."""
    command = [sys.executable, "-c", PARENT, HOLD, str(path), *words]
    started = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=60)
    pid = int(started.stdout)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_ctrl_c_ends_a_daemon_that_waits_for_the_lock(path: Path, holder: subprocess.Popen[bytes]) -> None:
    command = children.command("server", "daemon", "--data-dir", str(path.parent))
    waiting = subprocess.Popen(
        command,
        env=children.environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
    )
    try:
        assert waiting.stderr is not None
        assert "waiting_for_lock" in waiting.stderr.readline()
        waiting.send_signal(signal.SIGINT)
        assert (waiting.stderr.read(), waiting.wait()) == ("", 130)
    finally:
        waiting.kill()
        waiting.wait()


def test_the_lock_is_free_as_soon_as_its_holder_is_dead(path: Path, holder: subprocess.Popen[bytes]) -> None:
    holder.kill()
    began = time.monotonic()
    with lock.hold(path, supervised=True):
        assert time.monotonic() - began < 2
        assert path.read_text() == f"{os.getpid()} {os.getppid()}"


def test_a_holder_that_has_its_parent_is_never_killed(path: Path, holder: subprocess.Popen[bytes]) -> None:
    lock._kill_orphan(path)
    with pytest.raises(subprocess.TimeoutExpired):
        holder.wait(0.5)


def test_an_orphan_that_does_not_end_itself_is_killed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "ORPHAN_SECONDS", 0.5)
    with left_alone(path, "supervised") as orphan:
        began = time.monotonic()
        with lock.hold(path, supervised=True):
            assert time.monotonic() - began >= 0.5
            assert is_gone(orphan)


def test_a_lone_holder_whose_shell_has_ended_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "ORPHAN_SECONDS", 0.0)
    with left_alone(path) as lone:
        waiting = threading.Thread(target=lambda: lock.hold(path, supervised=False).close())
        waiting.start()
        waiting.join(1)
        assert waiting.is_alive()
        assert not is_gone(lone)
        os.kill(lone, signal.SIGKILL)
        waiting.join(10)
        assert not waiting.is_alive()


def test_a_process_that_only_bears_the_number_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        path.write_text(f"{bystander.pid} 1")
        lock._kill_orphan(path)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize("content", ["", "12", "999999 1"])
def test_a_lock_file_that_names_nobody_is_no_error(content: str, path: Path) -> None:
    path.parent.mkdir()
    path.write_text(content)
    lock._kill_orphan(path)
    with lock.hold(path, supervised=True):
        assert path.read_text().startswith(str(os.getpid()))
