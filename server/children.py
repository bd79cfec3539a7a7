"""Child processes of the server: this interpreter and this copy of our code, whatever lies in the current folder."""

import os
import sys
from pathlib import Path

import server


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module of ours. `-P`: nothing is imported from the current folder."""
    return [sys.executable, "-P", "-m", module, *arguments]


def environment(**values: str) -> dict[str, str]:
    """Ours, in which `command` finds its module also where we are not installed. `values` give way to what is set."""
    home = str(Path(server.__file__ or "").parents[1])
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**values, **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
