"""Each invariant's test can fail: it sees a scheduler that breaks the invariant."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scheduler.mutants import INVARIANTS, MUTANTS, TENANCY, Mutant

ROOT = Path(__file__).parent.parent.parent
PLUGINS = ("-p", "hypothesispytest", "-p", "no:cacheprovider")
"""No others: to load all that are installed takes longer than a mutant's test."""
SELF_CHECK = "    _check(snapshot, decision)\n"
"""Of `plan`: taken out, so that the test has to see the fault."""


def test_every_invariant_has_a_mutant():
    texts = [(ROOT / file.partition("::")[0]).read_text(encoding="utf-8") for file in (INVARIANTS, TENANCY)]
    named = {name for text in texts for name in re.findall(r"\bI\d+\b", text)}
    assert named == {mutant.invariant for mutant in MUTANTS} == {f"I{number}" for number in range(1, 15)}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.invariant} {mutant.fault}")
def test_a_scheduler_with_a_fault_is_caught_by_the_test_of_its_invariant(mutant: Mutant, tmp_path: Path):
    shutil.copytree(ROOT / "scheduler", tmp_path / "scheduler")
    shutil.copytree(ROOT / "tests" / "scheduler", tmp_path / "tests" / "scheduler")
    (tmp_path / "tests" / "__init__.py").touch()
    replace_once(tmp_path / "scheduler" / "plan.py", SELF_CHECK, "")
    replace_once(tmp_path / "scheduler" / mutant.file, mutant.before, mutant.after)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *PLUGINS, "--hypothesis-profile=mutants", mutant.test],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "ONLY_INVARIANT": mutant.invariant,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert "1 failed" in run.stdout
    assert "AssertionError" in run.stdout


def replace_once(path: Path, before: str, after: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{path.name} has {text.count(before)} times {before!r}"
    path.write_text(text.replace(before, after), encoding="utf-8")
