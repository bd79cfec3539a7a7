"""What rides together."""

import pytest

from scheduler.plan import Plan, Slot, plan
from scheduler.snapshot import Microbatch, ResidentRun
from tests.scheduler.builders import resident, snapshot, tenant
from tests.scheduler.simulation import Client, World, microbatches


def riders(decision: Plan) -> dict[str, int]:
    return {slot.run_id: slot.num_microbatches for slot in decision.gang}


def test_nobody_rides_when_nothing_is_offered():
    assert plan(snapshot()).gang == ()


def test_several_microbatches_of_one_run_ride_in_one_gang():
    decision = plan(snapshot(tenant("a", resident("a1", 100, 90, 80)), token_budget=200))
    assert decision.gang == (Slot(run_id="a1", num_microbatches=2, cost=190),)
    assert decision.rises == {"a": 190.0}


def test_charges_are_cost_over_share_and_cost_over_weight():
    microbatch = Microbatch(tokens=50, cost=80)
    run = ResidentRun(run_id="a1", weight=16, counter=0.0, order=0, microbatches=(microbatch,))
    decision = plan(snapshot(tenant("a", run, share=4.0)))
    assert decision.gang[0].cost == 80
    assert decision.rises == {"a": 20.0}
    assert decision.run_rises == {"a1": 5.0}


def test_the_smallest_counter_goes_first():
    decision = plan(
        snapshot(
            tenant("a", resident("a1", 100), counter=10.0),
            tenant("b", resident("b1", 100), counter=9.0),
            token_budget=100,
        )
    )
    assert riders(decision) == {"b1": 1}


def test_a_head_that_does_not_fit_lets_a_small_one_ride_within_the_bound():
    decision = plan(
        snapshot(
            tenant("a", resident("a1", 70, 70), counter=0.0),
            tenant("b", resident("b1", 20), counter=75.0),
            token_budget=100,
        )
    )
    assert riders(decision) == {"a1": 1, "b1": 1}


def test_no_head_rides_past_one_that_does_not_fit_beyond_the_bound():
    decision = plan(
        snapshot(
            tenant("a", resident("a1", 70, 70), counter=0.0),
            tenant("b", resident("b1", 20), counter=155.0),
            token_budget=100,
        )
    )
    assert riders(decision) == {"a1": 1}


def test_the_bound_also_holds_below_fill_min_while_the_room_is_what_stops_the_smallest():
    decision = plan(
        snapshot(
            tenant("a", resident("a1", 70, 70), counter=0.0),
            tenant("b", resident("b1", 20), counter=155.0),
            token_budget=100,
            fill_min=95,
        )
    )
    assert riders(decision) == {"a1": 1}


def test_who_has_run_out_is_owed_and_the_gang_closes_early():
    decision = plan(snapshot(tenant("owed", resident("o", 10), share=10.0), tenant("busy", resident("b", *[50] * 8))))
    assert riders(decision) == {"o": 1, "b": 2}
    assert decision.floor == 1.0


def test_a_gang_that_would_close_early_still_reaches_fill_min_and_takes_along_who_is_owed():
    decision = plan(
        snapshot(
            tenant("owed", resident("o", 10), share=10.0),
            tenant("busy", resident("b", *[50] * 8)),
            fill_min=200,
        )
    )
    assert decision.gang == (
        Slot(run_id="b", num_microbatches=4, cost=200),
        Slot(run_id="o", num_microbatches=1, cost=10),
    )
    assert decision.rises == {"busy": 200.0, "owed": 100.0}  # 10 / 10, and up to the bound of 100 behind
    assert decision.run_rises == {"o": 10.0, "b": 200.0}


def test_who_is_owed_loses_nothing_of_what_it_was_behind():
    decision = plan(
        snapshot(
            tenant("owed", resident("o", 10), counter=0.0),
            tenant("busy", resident("b", *[50] * 8), counter=900.0),
            fill_min=50,
        )
    )
    assert decision.rises == {"busy": 50.0, "owed": 10.0 + 50.0}


def test_below_fill_min_heads_go_to_the_smallest_counter_that_has_one():
    decision = plan(
        snapshot(
            tenant("owed", resident("o", 10)),
            tenant("near", resident("n", 60, 60), counter=500.0),
            tenant("far", resident("f", 60, 60), counter=550.0),
            fill_min=150,
        )
    )
    assert riders(decision) == {"o": 1, "n": 2, "f": 1}


def test_equal_tenants_beside_one_that_is_owed_get_equal_parts():
    """Who cannot use its large share holds the others to `fill_min`; these take turns at it."""
    world = World(
        max_microbatch_cost=1024,
        fill_min=320,
        clients={"owed": Client(share=10), "f": Client(share=1), "g": Client(share=1)},
    )
    world.submit("owed", "o", [microbatches(50)] * 500)
    for name in "fg":
        world.submit(name, name, [microbatches(*[1000] * 1000)])
    world.gangs(500)
    assert abs(world.served("f") - world.served("g")) <= 2 * 1024
    assert world.served("owed") == 500 * 50


def test_a_run_that_is_owed_holds_its_siblings_to_equal_parts_too():
    world = World(max_microbatch_cost=1024, fill_min=320, clients={"a": Client(share=1)})
    world.submit("a", "owed", [microbatches(50)] * 500, weight=16)
    siblings = [world.submit("a", name, [microbatches(*[1000] * 1000)]) for name in "fg"]
    world.gangs(400)
    assert abs(siblings[0].charged - siblings[1].charged) <= 2 * 1024


def test_a_run_that_has_run_out_is_owed_by_its_tenants_other_runs():
    decision = plan(
        snapshot(tenant("a", resident("high", 10, weight=16, order=2), resident("low", *[50] * 8, order=1)))
    )
    assert riders(decision) == {"low": 2, "high": 1}


def test_a_head_that_can_never_fit_is_refused_at_once():
    with pytest.raises(AssertionError, match="over 400 tokens"):
        snapshot(tenant("a", resident("a1", 401)))


def test_a_head_that_costs_more_than_the_bound_allows_is_refused_at_once():
    with pytest.raises(AssertionError, match="over a cost of 100"):
        snapshot(tenant("a", resident("a1", 101)))


def test_a_large_counter_does_not_round_the_smallest_tenant_out_of_its_turn():
    """118800784.967 + 80/7 − 118800784.967 is more than 80/7."""
    decision = plan(
        snapshot(
            tenant("a", resident("a1", 80, 80), share=7.0, counter=118800784.967),
            token_budget=80,
            max_microbatch_cost=80,
        )
    )
    assert riders(decision) == {"a1": 1}
