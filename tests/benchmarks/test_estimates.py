"""The benchmark reads the real server's estimates; how good they are on a busy machine is for a machine to say."""

import json
from pathlib import Path

import pytest

from benchmarks.estimates import MOST_ERROR, PARTIES, THIRDS, Actual, Reading, compare, exit_code, main


def test_errors_are_parts_of_the_whole_and_of_what_was_left() -> None:
    """Two jobs in 100 seconds; the machine is slow in the second half, which nobody could know."""
    actual = {"a": Actual(start=1000.0, finish=1050.0, tokens=80), "b": Actual(1050.0, 1100.0, 20)}
    readings = [
        Reading("single", "b", at=999.0, trained=0, start=1000.0, finish=1100.0),  # before all
        Reading("single", "a", at=1025.0, trained=40, start=None, finish=1060.0),
        Reading("double", "b", at=1025.0, trained=40, start=1050.0, finish=1062.5),
        Reading("double", "b", at=1050.0, trained=80, start=None, finish=None),
        Reading("double", "b", at=1099.0, trained=99, start=None, finish=1098.0),
    ]
    report = compare(readings, actual)
    assert (report["jobs"], report["seconds"], report["readings"]) == (2, 100.0, 5)
    assert report["start"]["all"]["count"] == 1
    assert report["start"]["all"]["of_the_whole"]["p90"] == 0
    of_a, of_b = report["finish"]["single"], report["finish"]["first third"]
    assert of_a["of_the_whole"]["median_late"] == pytest.approx(0.1)
    assert of_a["of_what_was_left"]["median_late"] == pytest.approx(10 / 25)
    assert of_a["at_even_speed"]["median_late"] == pytest.approx(0.4 + 35 * 0.016 - 0.8)
    assert of_b["count"] == 2
    assert of_b["of_the_whole"]["p90"] == pytest.approx(0.1 + 0.9 * (0.375 - 0.1))
    assert of_b["at_even_speed"]["median"] == pytest.approx((0.16 + 0.0) / 2)
    assert report["finish"]["last third"]["of_what_was_left"] is None


@pytest.mark.parametrize(("p90", "code"), [(MOST_ERROR, 0), (MOST_ERROR + 0.01, 1)])
def test_finishes_that_are_too_far_off_are_told_by_the_exit_code(p90: float, code: int) -> None:
    assert exit_code({"finish": {"all": {"at_even_speed": {"p90": p90}}}}) == code


@pytest.mark.slow
def test_one_command_compares_what_was_told_with_what_came(tmp_path: Path) -> None:
    report_file = tmp_path / "estimates.json"
    main(["--steps", "25", "--every", "0.2", "--json", str(report_file)])  # too short a time for good estimates
    report = json.loads(report_file.read_text())
    assert report["jobs"] == sum(len(party.jobs) for party in PARTIES.values())
    assert set(report["finish"]) == {"all", *THIRDS, *PARTIES}
    counts = [report["finish"][third]["count"] for third in THIRDS]
    assert sum(counts) == report["finish"]["all"]["count"] <= report["readings"]
    assert report["finish"]["all"]["at_even_speed"]["median"] < MOST_ERROR
    assert report["start"]["all"]["count"] > 0
