"""Named places where a test makes something go wrong. Off, and a call of nothing, unless MIXLOOM_FAULTS is set.

MIXLOOM_FAULTS is the path of a file that a test writes with `arm`, also while the server runs. A fault that has struck
is gone from it, so that the next process does not meet it again.
"""

import errno
import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

POINTS = {
    "claim.done": "a run is leased, its job is being loaded; about the job's name",
    "put.written": "a folder is filled under another name, nothing of it is synced; about the first part of its key",
    "put.synced": "its files are on the disk",
    "put.renamed": "it is at its key, the folder above is not synced",
    "put.published": "it is durable, no row names it yet",
    "point.published": "a row names a recovery point, those before the newest two are still there",
    "pass.begin": "before a pass; about the names of the jobs that ride in it",
    "record.begin": "a gang is computed, nothing of it is written yet",
    "record.end": "what a gang came to is written",
    "answer.append": "before a line of what `/generate` asked for is written",
}
"""Every name that `fault` is called with, and where. A test reads the calls and fails when this is not the same."""

Kind = Literal["kill", "abort", "EIO", "ENOSPC", "delay", "hang"]
VARIABLE = "MIXLOOM_FAULTS"
_FILE = os.environ.get(VARIABLE)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that goes wrong at a point."""

    point: str
    kind: Kind
    about: str = ""  # strikes only where this is among what the call is about; empty: everywhere
    after: int = 0  # passes of the point to let go by first
    times: int = 1  # how often it strikes
    seconds: float = 1.0  # of a delay


def arm(path: Path, *faults: Fault) -> None:
    """Write the faults to be met from now on, in place of those before."""
    unknown = [fault.point for fault in faults if fault.point not in POINTS]
    assert not unknown, f"no such points: {unknown}"
    with _held(path, os.O_CREAT) as file:
        _write(file, [asdict(fault) for fault in faults])


def fault(point: str, about: Sequence[str] = ()) -> None:
    """A place where what is armed strikes."""
    if _FILE is not None and (struck := _next(Path(_FILE), point, about)):
        _strike(struck)


def _next(path: Path, point: str, about: Sequence[str]) -> Fault | None:
    """The fault that strikes now, which is counted in the file before it does."""
    if not path.exists():
        return None
    with _held(path) as file:
        armed = json.loads(file.read() or "[]")
        for one in armed:
            if one["point"] != point or not one["times"] or (one["about"] and one["about"] not in about):
                continue
            is_now = one["after"] == 0
            one["times" if is_now else "after"] -= 1
            _write(file, armed)
            return Fault(**one) if is_now else None
    return None


@contextmanager
def _held(path: Path, flags: int = 0) -> Iterator[TextIO]:
    """One at a time: else who counts a strike would write again what another has just taken out."""
    with os.fdopen(os.open(path, os.O_RDWR | flags, 0o666), "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _write(file: TextIO, faults: list[dict[str, Any]]) -> None:
    file.seek(0)
    file.truncate()
    json.dump(faults, file)


def _strike(struck: Fault) -> None:
    if struck.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif struck.kind == "abort":
        os.abort()
    elif struck.kind == "delay":
        time.sleep(struck.seconds)
    elif struck.kind == "hang":
        while True:
            time.sleep(3600)
    else:
        raise OSError(getattr(errno, struck.kind), f"fault at {struck.point}")
