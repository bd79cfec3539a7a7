"""Tries the mutants in a process of its own, one after the other: `python -m tests.scheduler.trial FOLDER`.

One for all, since to load Hypothesis takes longer than a mutant's test; of ours each mutant's copy is loaded anew.
What it prints is a line of JSON: for each fault what its test raised, or null.
"""

import importlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from hypothesis import Phase, settings

from tests.scheduler.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parent.parent.parent
SELF_CHECK = "    _check(snapshot, decision)\n"
"""Of `plan`: taken out, so that the test has to see the fault."""


def make(mutant: Mutant, folder: Path) -> None:
    """A copy of the scheduler with the fault, and of its tests."""
    shutil.copytree(ROOT / "scheduler", folder / "scheduler")
    shutil.copytree(ROOT / "tests" / "scheduler", folder / "tests" / "scheduler")
    (folder / "tests" / "__init__.py").touch()
    replace_once(folder / "scheduler" / "plan.py", SELF_CHECK, "")
    replace_once(folder / "scheduler" / mutant.file, mutant.before, mutant.after)


def replace_once(path: Path, before: str, after: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{path.name} has {text.count(before)} times {before!r}"
    path.write_text(text.replace(before, after), encoding="utf-8")


def raised(mutant: Mutant, folder: Path) -> str | None:
    """What the mutant's test raises: its name, and what it says."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("scheduler", "tests")]:
        del sys.modules[name]
    sys.path[0] = str(folder)
    os.environ["ONLY_INVARIANT"] = mutant.invariant
    file, _, name = mutant.test.partition("::")
    test: Any = getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), name)
    try:
        test().runTest() if isinstance(test, type) else test()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def main(folder: Path) -> None:
    sys.dont_write_bytecode = True
    os.environ["NUM_EXAMPLES"] = "600"
    settings.register_profile(
        "mutants", phases=[Phase.generate], database=None, derandomize=True, report_multiple_bugs=False
    )
    settings.load_profile("mutants")  # the first example that fails is enough
    said = {}
    for number, mutant in enumerate(MUTANTS):
        make(mutant, folder / str(number))
        said[mutant.fault] = raised(mutant, folder / str(number))
    print(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
