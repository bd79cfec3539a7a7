"""What holds on every trace, whatever tenants do; `test_tenancy.py` has what holds after each single plan.

What an assertion says begins with its invariant: `test_mutants.py` reads it.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scheduler.promise import longest_waits
from scheduler.snapshot import Microbatch
from tests.scheduler.simulation import Client, Run, World
from tests.scheduler.strategies import (
    MAX_COST,
    SLACK,
    L,
    Trace,
    brief,
    endless,
    patterns,
    shares,
    steps,
    traces,
    weights,
)

NUM_EXAMPLES = int(os.environ.get("NUM_EXAMPLES", "60"))
"""With a mutant there are more: which examples are drawn hangs on a test's text, and 60 may miss a fault."""
quick = settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass
class Gap:
    """How far S_f/w_f − S_g/w_g wandered while both were backlogged without a pause."""

    low: float = 0.0
    high: float = 0.0
    now: float = 0.0

    def move(self, by: float) -> None:
        self.now += by
        self.low, self.high = min(self.low, self.now), max(self.high, self.now)


@quick
@given(traces())
def test_served_work_differs_by_at_most_one_microbatch_each_over_any_interval(trace: Trace):
    """I4: |S_f/w_f − S_g/w_g| ≤ L/w_f + L/w_g for tenants that do not run out, whoever else is owed."""
    world = trace.world
    gaps = {}
    for number, switched in enumerate(trace.switches):
        trace.switch(switched, number)
        before = {name: client.served for name, client in world.clients.items()}
        decision = world.gang()
        parts = {name: (one.served - before[name]) / one.share for name, one in world.clients.items()}
        for f, g in combinations(trace.steady, 2):
            if {f, g} <= decision.backlogged:
                gap = gaps.setdefault((f, g), Gap())
                gap.move(parts[f] - parts[g])
                bound = MAX_COST / world.clients[f].share + MAX_COST / world.clients[g].share
                assert gap.high - gap.low <= bound + SLACK, "I4: two tenants wander apart"
            else:
                gaps.pop((f, g), None)


@quick
@given(patterns=st.lists(patterns, min_size=3, max_size=3), budget=st.integers(1, 6))
def test_a_tenants_runs_share_by_priority_within_the_same_bound(patterns: list[list[Microbatch]], budget: int):
    world = World(token_budget=budget * L, max_microbatch_cost=MAX_COST, clients={"a": Client(share=2.0)})
    runs = [
        world.submit("a", f"weight-{weight}", endless(pattern), weight=weight)
        for weight, pattern in zip((1, 4, 16), patterns, strict=True)
    ]
    gaps = {pair: Gap() for pair in combinations(range(3), 2)}
    for _ in range(40):
        before = [run.charged for run in runs]
        world.gang()
        parts = [(run.charged - was) / run.weight for run, was in zip(runs, before, strict=True)]
        for (f, g), gap in gaps.items():
            gap.move(parts[f] - parts[g])
            assert gap.high - gap.low <= MAX_COST / runs[f].weight + MAX_COST / runs[g].weight + SLACK


@quick
@given(
    patterns=st.lists(patterns, min_size=2, max_size=2),
    pair=st.tuples(weights, weights),
    moment=st.integers(0, 20),
    elsewhere=st.integers(-20, 20),
)
def test_a_run_that_was_elsewhere_shares_with_its_siblings_from_when_it_comes(
    patterns: list[list[Microbatch]], pair: tuple[int, int], moment: int, elsewhere: int
):
    """I15: whether it got far ahead of them there or fell far behind."""
    world = World(token_budget=2 * L, max_microbatch_cost=MAX_COST, clients={"a": Client(share=2.0)})
    there = world.submit("a", "there", endless(patterns[0]), weight=pair[0])
    world.gangs(moment + 1)
    comes = world.submit("a", "comes", endless(patterns[1]), weight=pair[1])
    comes.counter = there.counter + elsewhere * MAX_COST
    gap, before = Gap(), (there.charged, comes.charged)
    for _ in range(40):
        world.gang()
        parts = [(run.charged - was) / run.weight for run, was in zip((there, comes), before, strict=True)]
        gap.move(parts[0] - parts[1])
        before = (there.charged, comes.charged)
        bound = MAX_COST / there.weight + MAX_COST / comes.weight
        assert gap.high - gap.low <= bound + SLACK, "I15: a run that comes and one that was there wander apart"


@quick
@given(
    patterns=st.lists(patterns, min_size=4, max_size=4),
    weights_=st.lists(weights, min_size=4, max_size=4),
    moment=st.integers(0, 40),
)
def test_runs_that_have_lost_work_together_share_as_before(
    patterns: list[list[Microbatch]], weights_: list[int], moment: int
):
    """I15: what each gets back for itself does not set it apart from its siblings."""
    world = World(
        token_budget=2 * L, max_microbatch_cost=MAX_COST, max_resident_runs=4, clients={"a": Client(share=2.0)}
    )
    runs = [
        world.submit("a", str(number), endless(pattern), weight=weight)
        for number, (pattern, weight) in enumerate(zip(patterns, weights_, strict=True))
    ]
    world.gangs(moment + 1)
    world.crash()
    world.gang()
    gaps = {(one.run_id, other.run_id): Gap() for one in runs for other in runs if one.run_id < other.run_id}
    before = [run.charged for run in runs]
    for _ in range(40):
        world.gang()
        parts = {run.run_id: (run.charged - was) / run.weight for run, was in zip(runs, before, strict=True)}
        before = [run.charged for run in runs]
        bounds = {run.run_id: MAX_COST / run.weight for run in runs}
        for (one, other), gap in gaps.items():
            gap.move(parts[one] - parts[other])
            assert gap.high - gap.low <= bounds[one] + bounds[other] + SLACK, "I15: siblings wander apart"


@quick
@given(traces(), st.integers(0, 40))
def test_every_run_that_offers_something_rides_by_the_gang_that_was_promised(trace: Trace, moment: int):
    """I7: whoever is owed, behind or ahead, as long as nobody comes or goes."""
    world = trace.world
    for number, switched in enumerate(trace.switches[: moment + 1]):
        trace.switch(switched, number)
        world.gang()
    waiting = longest_waits(world.snapshot())
    assert set(waiting) == set(world.resident())
    while waiting:
        rode = {slot.run_id for slot in world.gang().gang}
        waiting = {run_id: left - 1 for run_id, left in waiting.items() if run_id not in rode}
        assert all(left > 0 for left in waiting.values()), "I7: a run rides later than was promised"


@quick
@given(loads=st.lists(st.tuples(st.sampled_from("abcd"), steps, weights), min_size=1, max_size=10))
def test_every_run_is_finished_whoever_competes(loads: list[tuple[str, list[list[Microbatch]], int]]):
    """I6: a gang with work is never empty, so all is done after as many gangs as microbatches."""
    world, _ = submitted(loads)
    world.gangs(sum(len(step) for _, steps_, _ in loads for step in steps_))
    assert sum(client.served for client in world.clients.values()) == sum(
        one.cost for _, steps_, _ in loads for step in steps_ for one in step
    ), "I6: work is left over"


@quick
@given(
    loads=st.lists(st.tuples(st.sampled_from("abcd"), steps, weights), min_size=2, max_size=7),
    order=st.permutations(range(7)),
)
def test_the_order_in_which_jobs_are_submitted_changes_when_they_train_and_not_on_what(
    loads: list[tuple[str, list[list[Microbatch]], int]], order: list[int]
):
    """I10: a run's microbatches are all taken, whole and in its own order."""
    for turned in (loads, [loads[index] for index in order if index < len(loads)]):
        world, runs = submitted(turned)
        world.gangs(sum(len(step) for _, steps_, _ in turned for step in steps_))
        for run, (_, steps_, _) in zip(runs, turned, strict=True):
            assert run.trained == [one for step in steps_ for one in step], "I10: a run trains on something else"


@quick
@given(traces(), shares, st.integers(0, 30))
def test_a_new_share_counts_from_now_on(trace: Trace, share: float, moment: int):
    """I11: who is ahead stays so by as much cost; from then on the bound is that of the new share."""
    world = trace.world
    trace.switch(set(world.clients), 0)
    world.gangs(moment + 1)
    counters = {name: one.counter for name, one in world.clients.items() if name != "a"}
    world.reweight("a", share)
    before = {name: one.served for name, one in world.clients.items()}
    snapshot = world.snapshot()
    others = {one.tenant_id: one.counter for one in snapshot.tenants if one.tenant_id != "a"}
    assert others == counters, "I11: a new share changes another's counter"
    world.gangs(20)
    parts = {name: (one.served - before[name]) / one.share for name, one in world.clients.items()}
    for name in trace.steady:
        if name != "a":
            bound = MAX_COST / share + MAX_COST / world.clients[name].share
            assert abs(parts["a"] - parts[name]) <= bound + SLACK, "I11: it is not served by its new share"


@quick
@given(
    steps_of_others=st.lists(steps, min_size=4, max_size=8),
    owners=st.lists(st.sampled_from("abc"), min_size=8, max_size=8),
)
def test_a_tenant_that_submits_to_a_busy_server_soon_trains(
    steps_of_others: list[list[list[Microbatch]]], owners: list[str]
):
    """I7: with a place for each tenant, its run is resident after one optimizer step of who gives way, and rides."""
    world = World(
        token_budget=4 * L,
        max_microbatch_cost=MAX_COST,
        max_resident_runs=4,
        clients={n: Client(share=1) for n in "abcz"},
    )
    runs = {
        f"run-{number}": world.submit(owner, f"run-{number}", steps_ * 100)
        for number, (owner, steps_) in enumerate(zip(owners, steps_of_others, strict=False))
    }
    world.gangs(8)
    world.submit("z", "newcomer", [[Microbatch(tokens=L, cost=L)]] * 50)
    asked: dict[str, int] = {}  # to give way, in which step
    while "newcomer" not in world.resident():
        left = asked.keys() - set(world.resident())
        steps_before = {run_id: run.step for run_id, run in runs.items()}
        asked |= {run_id: steps_before[run_id] for run_id in world.gang().evict}
        assert asked, "I7: nobody gives way"
        assert all(runs[run_id].step <= step + 1 for run_id, step in asked.items()), "I7: it gives way too late"
        assert not left or "newcomer" in world.resident(), "I7: the place is not the newcomer's"
    rode = "newcomer" in {slot.run_id for slot in world.history[-1][1].gang}
    assert rode or "newcomer" in {slot.run_id for slot in world.gang().gang}, "I7: it has a place and does not ride"


@quick
@given(
    patterns=st.lists(patterns, min_size=3, max_size=6),
    shares=st.lists(shares, min_size=6, max_size=6),
    num_places=st.integers(1, 2),
)
def test_a_tenant_without_a_place_waits_for_at_most_one_stay_of_each_other(
    patterns: list[list[Microbatch]], shares: list[float], num_places: int
):
    """I7: beyond what brings the other's counter up to its own, where it is smaller."""
    clients = {name: Client(share=share) for name, share in zip("abcdef"[: len(patterns)], shares, strict=False)}
    world = World(
        token_budget=2 * L,
        max_microbatch_cost=MAX_COST,
        max_resident_runs=num_places,
        min_stay=2 * L,
        clients=clients,
    )
    for name, pattern in zip(clients, patterns, strict=True):
        world.submit(name, name, brief(pattern))
    least = min(client.share for client in clients.values())
    gang_in_which_it_is_over_and_one_more = 2 * num_places * MAX_COST
    since: dict[str, dict[str, tuple[float, int]]] = {}  # of who waits: each other's counter and service at the start
    for _ in range(120):
        world.gang()
        for name, client in clients.items():
            if client.resident:
                since.pop(name, None)
                continue
            start = since.setdefault(name, {other: (one.counter, one.served) for other, one in clients.items()})
            for other, (counter, served) in start.items():
                share = clients[other].share
                behind = max(0.0, share * (client.counter - counter))
                stay = world.min_stay * share / least + gang_in_which_it_is_over_and_one_more
                assert clients[other].served - served <= behind + stay + SLACK, "I7: it waits for more than a stay"


@quick
@given(pattern=patterns, others=st.lists(patterns, min_size=1, max_size=3), parts=st.integers(2, 6))
def test_work_that_is_split_into_many_runs_gets_no_more(
    pattern: list[Microbatch], others: list[list[Microbatch]], parts: int
):
    """I14."""
    world = World(
        token_budget=3 * L,
        max_microbatch_cost=MAX_COST,
        max_resident_runs=99,
        clients={"whole": Client(share=1), "split": Client(share=1)} | {f"o{n}": Client(share=1) for n in range(3)},
    )
    world.submit("whole", "whole", endless(pattern))
    for number in range(parts):
        world.submit("split", f"part-{number}", endless(pattern))
    for number, other in enumerate(others):
        world.submit(f"o{number}", f"o{number}", endless(other))
    world.gangs(60)
    assert abs(world.served("split") - world.served("whole")) <= 2 * MAX_COST, "I14: split work is served otherwise"


@quick
@given(
    loads=st.lists(st.tuples(st.sampled_from("abcd"), steps, weights), min_size=1, max_size=8), gangs=st.integers(0, 9)
)
def test_a_drain_lets_no_run_in_and_comes_to_an_end(loads: list[tuple[str, list[list[Microbatch]], int]], gangs: int):
    """I12."""
    world, _ = submitted(loads)
    world.gangs(gangs)
    world.draining = True
    for _ in range(sum(len(step) for _, steps_, _ in loads for step in steps_)):
        before = set(world.resident())
        world.gang()
        assert set(world.resident()) <= before, "I12: a run comes in while draining"
    assert world.resident() == [], "I12: a drain does not end"


def submitted(loads: Sequence[tuple[str, list[list[Microbatch]], int]]) -> tuple[World, list[Run]]:
    """A world with fewer places than runs, and its runs."""
    world = World(
        token_budget=2 * L,
        max_microbatch_cost=MAX_COST,
        max_resident_runs=3,
        min_stay=2 * L,
        clients={n: Client(share=1) for n in "abcd"},
    )
    runs = [world.submit(name, f"run-{n}", steps_, weight=weight) for n, (name, steps_, weight) in enumerate(loads)]
    return world, runs
