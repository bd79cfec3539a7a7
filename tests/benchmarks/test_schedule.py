"""The simulation itself: what goes in comes out, and what the scheduler promises is seen where others break it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.schedule import COSTS, main
from benchmarks.schedule.policies import POLICIES
from benchmarks.schedule.simulation import Simulation, Sizes
from benchmarks.schedule.timing import Timing
from benchmarks.schedule.workload import Job, Workload, draw


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of one run of the command."""
    file = tmp_path_factory.mktemp("schedule") / "schedule.json"
    assert main(["--tenants", "20", "--jobs", "300", "--seed", "3", "--processes", "1", "--json", str(file)]) == 0
    return json.loads(file.read_text())


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_every_job_that_is_not_cancelled_is_done_and_takes_the_time_that_its_work_takes(policy):
    workload = draw(Timing(json.loads(COSTS.read_text())), num_tenants=10, num_jobs=100, load=0.8, seed=1)
    outcome = Simulation(workload, policy).run()
    cancelled = np.isnan(outcome.stays)
    assert 0 < cancelled.sum() < 20
    takes, least = dict.fromkeys(workload.shares, 0.0), dict.fromkeys(workload.shares, 0.0)
    for job, is_cancelled in zip(workload.jobs, cancelled, strict=True):
        takes[job.tenant] += job.takes
        least[job.tenant] += 0.0 if is_cancelled else job.takes
    for tenant, took in outcome.took.items():
        assert least[tenant] <= took * (1 + 1e-9)
        assert took <= takes[tenant] * (1 + 1e-9)
    assert set(outcome.took) == {tenant for tenant, time in least.items() if time}
    assert sum(outcome.took.values()) < sum(takes.values())
    assert (outcome.waits[~cancelled] >= 0).all()
    assert (outcome.stays > outcome.waits)[~cancelled].all()


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_who_is_cancelled_goes_from_the_queue_or_its_place_and_its_tenant_s_next_job_comes(policy):
    """One is cancelled while it trains, one while it waits for it; the third has the machine from then on."""
    timing = Timing(json.loads(COSTS.read_text()))
    unit = timing.step("lora", [400])
    patience = (50 * sum(unit.takes), 10 * sum(unit.takes), math.inf)
    jobs = [Job("one", float(number), (unit,), num_rounds=100, patience=time) for number, time in enumerate(patience)]
    outcome = Simulation(Workload({"one": 1.0}, jobs), policy, Sizes(max_resident_runs=1)).run()
    assert np.isnan(outcome.stays).tolist() == [True, True, False]
    assert np.isnan(outcome.waits).tolist() == [False, True, False]
    assert outcome.waits[2] == pytest.approx(patience[0], rel=0.1)
    assert outcome.took["one"] == pytest.approx(150 * sum(unit.takes), rel=0.1)


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
