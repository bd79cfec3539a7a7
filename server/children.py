"""Child processes of the server: this interpreter and this copy of our code, whatever lies in the current folder."""

import os
import sys
from pathlib import Path

import server

WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000"}
"""How threads wait that compute: they spin for a moment, then sleep.

Those that spin for long starve the API, and each other on a busy machine; to wake one that sleeps takes longer than
many a step of a pass.
"""


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module of ours. `-P`: nothing is imported from the current folder."""
    return [sys.executable, "-P", "-m", module, *arguments]


def environment(**values: str) -> dict[str, str]:
    """Ours, in which `command` finds its module also where we are not installed. `values` give way to what is set."""
    home = str(Path(server.__file__ or "").parents[1])
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**values, **os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def environment_of_daemon() -> dict[str, str]:
    """`environment`, and what its libraries read when they are loaded."""
    is_operators = WAITING.keys() & os.environ.keys()  # of the two the count has the last word: both or none are ours
    return environment(
        **({} if is_operators else WAITING),
        MALLOC_ARENA_MAX="1",  # what a thread frees is there for the others (`engine.heap`)
        ONEDNN_PRIMITIVE_CACHE_CAPACITY="16384",  # a bfloat16 kernel is compiled for each shape, and gangs vary
    )
