"""The faults that tests inject: each kind strikes where and when it was armed, and every point is known by name."""

import ast
import errno
import signal
import subprocess
import sys
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
