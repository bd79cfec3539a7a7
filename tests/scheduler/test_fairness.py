"""Lifts, and shares between tenants and between a tenant's runs."""

import pytest

from scheduler.plan import plan
from tests.scheduler.builders import resident, snapshot, tenant
from tests.scheduler.simulation import Client, World, microbatches

ENDLESS = [microbatches(*([100] * 5000))]


def test_a_tenant_that_comes_back_starts_at_the_smallest_counter_of_the_backlogged():
    decision = plan(
        snapshot(
            tenant("away", resident("a", 100), counter=10.0, backlogged=False),
            tenant("busy", resident("b", 100), counter=500.0),
            tenant("busier", resident("c", 100), counter=550.0),
        )
    )
    assert decision.rises["away"] == 490.0 + 100.0


def test_a_lift_never_lowers_a_counter():
    decision = plan(
        snapshot(
            tenant("away", resident("a", 100), counter=700.0, backlogged=False),
            tenant("busy", resident("b", 100), counter=500.0),
        )
    )
    assert decision.rises == {"busy": 100.0}


def test_the_first_to_come_back_to_an_idle_server_starts_at_the_last_smallest_counter():
    decision = plan(snapshot(tenant("away", resident("a", 100), counter=10.0, backlogged=False), floor=300.0))
    assert decision.rises == {"away": 290.0 + 100.0}
    assert decision.floor == 400.0


def test_a_tenant_that_stays_backlogged_is_not_lifted():
    decision = plan(
        snapshot(
            tenant("owed", resident("a", 100), counter=450.0),
            tenant("busy", resident("b", 100), counter=500.0),
        )
    )
    assert decision.rises == {"owed": 100.0, "busy": 100.0}


def test_a_tenant_whose_runs_offer_nothing_does_not_hold_the_others_back():
    decision = plan(
        snapshot(tenant("loading", resident("a")), tenant("busy", resident("b", *[100] * 4), counter=5000.0))
    )
    assert decision.backlogged == {"busy"}
    assert decision.floor == 5400.0
    assert [(slot.run_id, slot.num_microbatches) for slot in decision.gang] == [("b", 4)]


def test_the_floor_stays_when_nobody_is_backlogged():
    assert plan(snapshot(floor=42.0)).floor == 42.0


def test_time_away_earns_no_credit():
    world = World(clients={"steady": Client(share=1), "returning": Client(share=1)})
    world.submit("steady", "s", ENDLESS)
    world.gangs(50)
    world.submit("returning", "r", ENDLESS)
    before = world.served("steady")
    world.gangs(21)
    assert world.served("returning") == pytest.approx(world.served("steady") - before, abs=2 * 4096 + 2048)


def test_shares_of_ten_to_one_give_ten_to_one():
    world = World(token_budget=400, max_microbatch_cost=100, clients={"a": Client(share=10), "b": Client(share=1)})
    world.submit("a", "a1", ENDLESS)
    world.submit("b", "b1", ENDLESS)
    world.gangs(300)
    assert abs(world.served("a") / 10 - world.served("b")) <= 100 / 10 + 100
    assert world.served("a") + world.served("b") == 400 * 300


def test_small_heads_do_not_slip_past_a_large_one_without_end():
    """Shares 10:1, heads of 60 and 5 in a budget of 100: free backfill would give 1.5:1."""
    world = World(token_budget=100, max_microbatch_cost=60, clients={"a": Client(share=10), "b": Client(share=1)})
    world.submit("a", "a1", [microbatches(*([60] * 2000))])
    world.submit("b", "b1", [microbatches(*([5] * 20000))])
    world.gangs(1000)
    assert abs(world.served("a") / 10 - world.served("b")) <= 60 / 10 + 60


def test_priorities_share_a_tenants_part_by_one_four_and_sixteen():
    world = World(token_budget=400, max_microbatch_cost=100, clients={"a": Client(share=1)})
    for weight in (1, 4, 16):
        world.submit("a", f"weight-{weight}", ENDLESS, weight=weight)
    world.gangs(3)
    runs = world.clients["a"].resident
    before = {weight: runs[f"weight-{weight}"].charged for weight in (1, 4, 16)}
    world.gangs(210)
    parts = {weight: (runs[f"weight-{weight}"].charged - before[weight]) / weight for weight in (1, 4, 16)}
    for weight in (4, 16):
        assert abs(parts[1] - parts[weight]) <= 100 + 100 / weight


def test_ties_within_a_tenant_go_to_the_first_submitted():
    decision = plan(snapshot(tenant("a", resident("a2", 100, order=2), resident("b1", 100, order=1)), token_budget=100))
    assert [slot.run_id for slot in decision.gang] == ["b1"]


def test_splitting_work_into_many_runs_earns_no_larger_part():
    world = World(token_budget=400, max_microbatch_cost=100, clients={"one": Client(share=1), "many": Client(share=1)})
    world.submit("one", "whole", ENDLESS)
    for index in range(5):
        world.submit("many", f"part-{index}", ENDLESS)
    world.gangs(100)
    assert abs(world.served("one") - world.served("many")) <= 200


def test_a_new_share_applies_from_now_on():
    world = World(token_budget=400, max_microbatch_cost=100, clients={"a": Client(share=1), "b": Client(share=1)})
    world.submit("a", "a1", ENDLESS)
    world.submit("b", "b1", ENDLESS)
    world.gangs(100)
    before = {name: world.served(name) for name in "ab"}
    world.clients["a"].share = 3
    world.gangs(100)
    after = {name: world.served(name) - before[name] for name in "ab"}
    assert abs(before["a"] - before["b"]) <= 200
    assert abs(after["a"] / 3 - after["b"]) <= 100 + 100


def test_a_run_that_joins_starts_at_its_tenants_smallest_run():
    world = World(token_budget=400, max_microbatch_cost=100, clients={"a": Client(share=1)})
    world.submit("a", "first", ENDLESS)
    world.gangs(20)
    world.submit("a", "second", ENDLESS)
    world.gang()
    runs = world.clients["a"].resident
    before = runs["first"].charged
    assert runs["second"].counter == runs["first"].counter
    world.gangs(20)
    assert abs(runs["first"].charged - before - runs["second"].charged) <= 200


def test_what_is_sampled_is_paid_like_training():
    decision = plan(
        snapshot(
            tenant("talks", resident("t", 50), counter=100.0, share=2.0, sampled=30),
            tenant("trains", resident("r", 50), counter=100.0),
        )
    )
    assert decision.rises == {"talks": 25.0 + 15.0, "trains": 50.0}


def test_who_only_samples_pays_from_the_floor_on():
    talks = tenant("talks", counter=10.0, share=2.0, backlogged=False, sampled=30)
    decision = plan(snapshot(talks, tenant("trains", resident("r", 50), counter=100.0), floor=100.0))
    assert decision.rises == {"talks": 90.0 + 15.0, "trains": 50.0}
    assert decision.backlogged == {"trains"}


def test_sampling_and_training_together_come_to_the_share():
    world = World(
        token_budget=400,
        max_microbatch_cost=100,
        fill_min=100,
        clients={"talks": Client(share=1), "trains": Client(share=1)},
    )
    for name in world.clients:
        world.submit(name, name, ENDLESS)
    for _ in range(200):
        world.gang()
        world.clients["talks"].sampled = 90
    assert abs(world.served("talks") + 199 * 90 - world.served("trains")) <= 200 + 90
