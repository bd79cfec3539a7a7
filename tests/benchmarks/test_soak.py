"""Few jobs through the real server, all of which are gone in the end."""

import json
from pathlib import Path

import pytest

from benchmarks.soak import main


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "jobs"), [("sqlite", 6), ("postgresql", 100)])
def test_after_all_jobs_are_deleted_the_server_is_as_small_as_before(
    kind: str, jobs: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """On PostgreSQL so many that their rows, were they left, would show beside its catalogs."""
    report_file = tmp_path / "soak.json"
    of_kind = ["--database-url", request.getfixturevalue("postgresql").new_database()] if kind == "postgresql" else []
    assert main(["--jobs", str(jobs), *of_kind, "--json", str(report_file)]) == 0
    report = json.loads(report_file.read_text())
    assert report["settings"]["database"] == kind
    assert report["succeeded"] == jobs
    assert report["bytes"]["with all of them"]["database"] > 1.05 * report["bytes"]["before"]["database"]
    assert report["bytes"]["with all of them"]["files"] > 1.5 * report["bytes"]["before"]["files"]
    assert max(report["left"].values()) <= 0.05
