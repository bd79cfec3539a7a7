"""The simulation itself: what goes in comes out, and what the scheduler promises is seen where others break it."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.schedule import COSTS, main
from benchmarks.schedule.policies import POLICIES
from benchmarks.schedule.simulation import Simulation
from benchmarks.schedule.timing import Timing
from benchmarks.schedule.workload import draw


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of one run of the command."""
    file = tmp_path_factory.mktemp("schedule") / "schedule.json"
    assert main(["--tenants", "20", "--jobs", "300", "--seed", "3", "--processes", "1", "--json", str(file)]) == 0
    return json.loads(file.read_text())


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_every_job_is_done_and_takes_the_time_that_its_work_takes(policy):
    workload = draw(Timing(json.loads(COSTS.read_text())), num_tenants=10, num_jobs=100, load=0.8, seed=1)
    outcome = Simulation(workload, policy).run()
    took = {name: sum(job.takes for job in workload.jobs if job.tenant == name) for name in outcome.took}
    assert outcome.took == pytest.approx(took)
    assert set(took) == {job.tenant for job in workload.jobs}
    assert (outcome.waits >= 0).all()
    assert (outcome.stays > outcome.waits).all()


def test_the_bound_on_shares_holds_and_others_without_it_are_seen_to_break_it(report: dict[str, Any]):
    errors = {name: both["with"]["share_error"]["max"] for name, both in report["policies"].items()}
    assert errors["mixloom"] <= 1.001
    assert min(errors["FIFO"], errors["round-robin by tenant"]) > 3


def test_a_flooder_slows_others_down_where_who_comes_first_is_served_first(report: dict[str, Any]):
    slowdowns = {
        name: both["with"]["small"]["1"]["p50"] / both["without"]["small"]["1"]["p50"]
        for name, both in report["policies"].items()
    }
    assert slowdowns["mixloom"] < 1.3
    assert slowdowns["FIFO"] > 1.9


def test_tiny_batches_saved_and_evaluated_at_every_step_take_no_more_than_their_share_of_the_time(
    report: dict[str, Any],
):
    shares = [one["time_over_share"] for one in report["adversary"]]
    assert len(shares) == 4
    assert max(shares) < 1.2
    assert max(shares) > 0.8  # with many jobs it gets what is its own


def test_the_plot_is_drawn(report: dict[str, Any], tmp_path: Path):
    pytest.importorskip("matplotlib")
    from benchmarks.schedule.plot import draw_plot

    draw_plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
