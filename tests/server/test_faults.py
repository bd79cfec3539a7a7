"""The faults that tests inject: each kind strikes where and when it was armed, and every point is known by name."""

import ast
import errno
import json
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server import children, faults
from server.faults import POINTS, Fault, arm, fault

SERVER = Path(faults.__file__ or "").parent
CALL = "from server.faults import fault; fault('pass.begin', ['alone']); print('went on')"


def run(path: Path | None) -> subprocess.CompletedProcess[str]:
    """A process that comes by one point."""
    environment = children.environment()
    environment.pop(faults.VARIABLE, None)
    if path is not None:
        environment[faults.VARIABLE] = str(path)
    return subprocess.run([sys.executable, "-c", CALL], env=environment, capture_output=True, text=True, check=False)


def test_every_point_is_named_once_and_every_name_is_a_point() -> None:
    called = []
    for file in SERVER.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "fault":
                assert isinstance(node.args[0], ast.Constant), f"{file}: a point is named by a literal"
                called.append(node.args[0].value)
    assert sorted(called) == sorted(POINTS)


def test_nothing_is_armed_without_the_variable_or_without_its_file(tmp_path: Path) -> None:
    for path in (None, tmp_path / "absent"):
        assert run(path).stdout == "went on\n"


@pytest.mark.parametrize(("kind", "signal_"), [("kill", signal.SIGKILL), ("abort", signal.SIGABRT)])
def test_what_ends_the_process_does_so_once(kind: faults.Kind, signal_: int, tmp_path: Path) -> None:
    arm(tmp_path / "faults", Fault(point="pass.begin", kind=kind))
    assert run(tmp_path / "faults").returncode == -signal_
    assert run(tmp_path / "faults").returncode == 0


@pytest.mark.parametrize("kind", ["EIO", "ENOSPC"])
def test_an_error_of_the_disk_comes_as_the_system_would_raise_it(kind: faults.Kind, armed: Path) -> None:
    arm(armed, Fault(point="record.begin", kind=kind))
    with pytest.raises(OSError, match=r"record\.begin") as caught:
        fault("record.begin")
    assert caught.value.errno == getattr(errno, kind)


def test_a_fault_strikes_after_so_many_passes_so_often_and_about_one_thing(armed: Path) -> None:
    arm(armed, Fault(point="pass.begin", kind="EIO", about="one", after=1, times=2))
    struck = []
    for about in (["other"], ["one"], ["one", "other"], ["other"], ["one"], ["one"]):
        try:
            fault("pass.begin", about)
            struck.append(False)
        except OSError:
            struck.append(True)
    assert struck == [False, False, True, False, True, False]


def test_a_point_that_is_not_there_cannot_be_armed(armed: Path) -> None:
    with pytest.raises(AssertionError, match="nowhere"):
        arm(armed, Fault(point="nowhere", kind="kill"))


def test_what_is_armed_anew_stays_so_although_a_fault_strikes_in_that_moment(armed: Path) -> None:
    """Who strikes reads the file and writes it again with one less."""
    stop, struck = threading.Event(), threading.Event()

    def strike() -> None:
        while not stop.is_set():
            try:
                fault("put.synced")
            except OSError:
                struck.set()

    with ThreadPoolExecutor(1) as pool:
        striking = pool.submit(strike)
        try:
            for _ in range(300):
                struck.clear()
                arm(armed, Fault(point="put.synced", kind="EIO", times=10**6))
                assert struck.wait(30)
                arm(armed)
                assert json.loads(armed.read_text()) == []
                fault("record.begin")  # has waited for whoever was at it
                assert json.loads(armed.read_text()) == []
        finally:
            stop.set()
        striking.result()
