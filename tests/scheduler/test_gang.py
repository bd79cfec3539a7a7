"""What rides together."""

import pytest

from scheduler.plan import Plan, Slot, plan
from scheduler.snapshot import Microbatch, ResidentRun
from tests.scheduler.builders import resident, snapshot, tenant


def riders(decision: Plan) -> dict[str, int]:
    return {slot.run_id: slot.num_microbatches for slot in decision.gang}


def test_nobody_rides_when_nothing_is_offered():
    assert plan(snapshot()).gang == ()


def test_several_microbatches_of_one_run_ride_in_one_gang():
    decision = plan(snapshot(tenant("a", resident("a1", 100, 90, 80)), token_budget=200))
    assert decision.gang == (Slot(run_id="a1", num_microbatches=2, charged=190),)
    assert decision.charges == {"a": 190.0}


def test_charges_are_cost_over_share_and_cost_over_weight():
    microbatch = Microbatch(tokens=50, cost=80)
    run = ResidentRun(run_id="a1", weight=16, counter=0.0, order=0, microbatches=(microbatch,))
    decision = plan(snapshot(tenant("a", run, share=4.0)))
    assert decision.gang[0].charged == 80
    assert decision.charges == {"a": 20.0}
    assert decision.run_charges == {"a1": 5.0}


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


def test_a_gang_that_would_close_early_still_reaches_fill_min_with_heads_that_ride_free():
    decision = plan(
        snapshot(
            tenant("owed", resident("o", 10), share=10.0),
            tenant("busy", resident("b", *[50] * 8)),
            fill_min=200,
        )
    )
    assert decision.gang == (
        Slot(run_id="b", num_microbatches=4, charged=100),
        Slot(run_id="o", num_microbatches=1, charged=10),
    )
    assert decision.charges == {"owed": 1.0, "busy": 100.0}
    assert decision.run_charges == {"o": 10.0, "b": 100.0}


def test_free_heads_go_to_the_smallest_counter():
    decision = plan(
        snapshot(
            tenant("owed", resident("o", 10)),
            tenant("near", resident("n", 100), counter=500.0),
            tenant("far", resident("f", 100), counter=600.0),
            fill_min=50,
        )
    )
    assert decision.gang == (
        Slot(run_id="n", num_microbatches=1, charged=0),
        Slot(run_id="o", num_microbatches=1, charged=10),
    )


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
