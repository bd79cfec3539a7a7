"""Each invariant's test can fail: it sees a scheduler that breaks the invariant."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scheduler.mutants import INVARIANTS, MUTANTS, TENANCY, Mutant

ROOT = Path(__file__).parent.parent.parent


def test_every_invariant_has_a_mutant():
    texts = [(ROOT / file.partition("::")[0]).read_text(encoding="utf-8") for file in (INVARIANTS, TENANCY)]
    named = {name for text in texts for name in re.findall(r"\bI\d+\b", text)}
    assert named == {mutant.invariant for mutant in MUTANTS} == {f"I{number}" for number in range(1, 16)}


@pytest.fixture(scope="module")
def raised(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """What the test of each fault raised."""
    command = [sys.executable, "-m", "tests.scheduler.trial", str(tmp_path_factory.mktemp("mutants"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.invariant} {mutant.fault}")
def test_a_scheduler_with_a_fault_is_caught_by_the_test_of_its_invariant(
    mutant: Mutant, raised: dict[str, str | None]
) -> None:
    said = raised[mutant.fault]
    assert said is not None, "nothing sees it"
    assert said.startswith(f"AssertionError: {mutant.invariant}: ")
