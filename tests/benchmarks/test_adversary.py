"""The benchmark sets a real server's tenants against each other; how fair prices are is for a quiet machine to say."""

import json
from pathlib import Path

import pytest

from benchmarks.adversary import ALONE, MOST, exit_code, main, taken
from benchmarks.tiny import write_tiny_base


def test_what_a_tenant_loses_is_what_the_other_took_of_its_half() -> None:
    speeds = {ALONE: [100.0, 200.0, 80.0], "equal": [50.0, 100.0, 40.0], "greedy": [40.0, 0.0, 60.0]}
    assert taken(speeds) == {"equal": 1.0, "greedy": pytest.approx(1.2)}


@pytest.mark.parametrize(("most", "code"), [(MOST, 0), (MOST + 0.01, 1)])
def test_who_takes_more_than_it_may_is_told_by_the_exit_code(most: float, code: int) -> None:
    assert exit_code({"taken": {"one": 0.5, "another": most}}) == code


@pytest.mark.slow
def test_one_command_sets_a_steady_tenant_beside_others(tmp_path: Path) -> None:
    base, file = write_tiny_base(tmp_path / "base"), tmp_path / "adversary.json"
    main(["--base", str(base), "--steps", "4", "--rounds", "2", "--jobs", "2", "--json", str(file)])
    report = json.loads(file.read_text())
    assert report["speeds"].keys() == {ALONE, *report["taken"]}
    assert len(report["taken"]) == 3
    assert all(speed > 0 for of in report["speeds"].values() for speed in of)
    assert [len(of) for of in report["speeds"].values()] == [2] * 4
