"""The plan as a value: pure, printable, checked."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from scheduler.plan import Slot, _check, plan
from scheduler.snapshot import Snapshot
from tests.scheduler.builders import resident, snapshot, tenant, waiting

BUSY = snapshot(
    tenant("a", resident("a1", 100, 50, order=1), resident("a2", 70, order=2, weight=4), counter=30.0, share=2.0),
    tenant("b", resident("b1", 90, 90, order=3), counter=10.0, next_run=waiting("b2", order=5)),
    tenant("c", resident("c1", 40, order=4), backlogged=False),
)


def test_equal_snapshots_give_equal_plans():
    assert plan(BUSY) == plan(replace(BUSY))


def test_the_order_of_tenants_and_runs_does_not_matter():
    turned = replace(BUSY, tenants=tuple(replace(one, resident=one.resident[::-1]) for one in reversed(BUSY.tenants)))
    assert plan(turned) == plan(BUSY)


def test_a_plan_does_not_depend_on_the_hash_seed():
    program = (
        "from scheduler.plan import plan\n"
        "from scheduler.snapshot import *\n"
        "run = lambda n: ResidentRun(run_id=f'r{n}', weight=1, counter=0.0, order=0,"
        " microbatches=(Microbatch(tokens=9, cost=9),) * 3)\n"
        "tenants = tuple(Tenant(tenant_id=f't{n}', share=1.0, counter=0.0, backlogged=False,"
        " resident=(run(n), run(n + 10)), waiting=None) for n in range(9))\n"
        "decision = plan(Snapshot(tenants=tenants, token_budget=50, max_microbatch_cost=9, fill_min=0,"
        " max_resident_runs=4, floor=0.0, draining=False))\n"
        "print(decision.gang, decision.rises, decision.evict)"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"gang": (Slot(run_id="a1", num_microbatches=3, cost=0),)}, "more than the 2 offered"),
        ({"gang": (Slot(run_id="a1", num_microbatches=1, cost=101),)}, "charged wrongly"),
        ({"gang": (Slot(run_id="a2", num_microbatches=1, cost=70),) * 2}, "rides twice"),
        ({"gang": ()}, "gang is empty"),
        ({"admit": ("b2",)}, "b2 does not fit"),
        ({"rises": {"a": -1.0}}, "a counter would fall"),
    ],
)
def test_a_plan_that_breaks_its_promise_is_not_handed_out(wrong: dict, complaint: str):
    full: Snapshot = replace(BUSY, max_resident_runs=4)
    with pytest.raises(AssertionError, match=complaint):
        _check(full, replace(plan(full), **wrong))


def test_a_gang_over_the_budget_is_not_handed_out():
    with pytest.raises(AssertionError, match="in a budget of 120"):
        _check(replace(BUSY, token_budget=120), plan(BUSY))


def test_a_run_or_a_tenant_that_appears_twice_is_refused():
    with pytest.raises(AssertionError, match="a run appears twice"):
        snapshot(tenant("a", resident("r", 10)), tenant("b", resident("r", 10)))
    with pytest.raises(AssertionError, match="a tenant appears twice"):
        snapshot(tenant("a", resident("r", 10)), tenant("a", resident("q", 10)))
