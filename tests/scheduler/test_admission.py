"""Who becomes resident, and who gives way."""

import pytest

from scheduler.admission import Wait, fitting_budget
from scheduler.plan import Plan, plan
from scheduler.snapshot import Footprint
from tests.scheduler.builders import resident, snapshot, tenant, waiting
from tests.scheduler.simulation import Client, World, microbatches

ENDLESS = [microbatches(100)] * 2000
HEAVY = [microbatches(*[100] * 10)] * 200


def test_a_free_place_goes_to_a_tenant_without_a_resident_run_before_all_others():
    decision = plan(
        snapshot(
            tenant("rich", resident("r1", 100), next_run=waiting("r2"), counter=0.0),
            tenant("new", next_run=waiting("n1", order=9), counter=900.0),
            max_resident_runs=2,
        )
    )
    assert decision.admit == ("n1",)


def test_further_free_places_go_in_order_of_the_tenants_counters():
    decision = plan(
        snapshot(
            tenant("a", resident("a1", 100), next_run=waiting("a2", order=3), counter=300.0),
            tenant("b", resident("b1", 100), next_run=waiting("b2", order=4), counter=200.0),
            max_resident_runs=3,
        )
    )
    assert decision.admit == ("b2",)


def test_among_tenants_without_a_run_the_smallest_counter_comes_first_then_who_came_first():
    decision = plan(
        snapshot(
            tenant("turned-out", next_run=waiting("t1", order=1), counter=100.0),
            tenant("late", next_run=waiting("l1", order=9)),
            tenant("early", next_run=waiting("e1", order=8)),
            floor=1000.0,
            max_resident_runs=2,
        )
    )
    assert decision.admit == ("e1", "l1")


def test_one_plan_admits_at_most_one_run_of_a_tenant():
    world = World(clients={"a": Client(share=1)})
    for index in range(3):
        world.submit("a", f"a{index}", ENDLESS)
    world.gang()
    assert [decision.admit for _, decision in world.history] == [("a0",), ("a1",), ("a2",), ()]


def test_a_tenants_runs_become_resident_by_priority_then_by_submission():
    world = World(max_resident_runs=1, clients={"a": Client(share=1)})
    for run_id, weight in (("low", 1), ("early", 4), ("late", 4), ("high", 16)):
        world.submit("a", run_id, [microbatches(100)], weight=weight)
    world.gangs(10)
    admitted = [run_id for _, decision in world.history for run_id in decision.admit]
    assert admitted == ["high", "early", "late", "low"]


def test_a_full_server_makes_room_for_a_tenant_without_a_resident_run():
    decision = plan(
        snapshot(
            tenant("two", resident("t1", 100, order=1), resident("t2", 100, order=2), counter=900.0),
            tenant("three", *(resident(f"h{n}", 100, order=n, weight=4 if n == 5 else 16) for n in (3, 4, 5))),
            tenant("new", next_run=waiting("n1")),
            max_resident_runs=5,
        )
    )
    assert decision.admit == ()
    assert decision.evict == ("h5",)


def test_among_tenants_with_equally_many_runs_the_one_with_the_largest_counter_gives_way():
    decision = plan(
        snapshot(
            tenant("a", resident("a1", order=1), resident("a2", order=2), counter=900.0),
            tenant("b", resident("b1", order=3), resident("b2", order=4), counter=800.0),
            tenant("new", next_run=waiting("n1")),
        )
    )
    assert decision.evict == ("a2",)


def test_nobody_gives_way_when_a_place_is_free():
    decision = plan(
        snapshot(
            tenant("a", resident("a1", 100), resident("a2", 100)),
            tenant("new", next_run=waiting("n1")),
            max_resident_runs=3,
        )
    )
    assert (decision.admit, decision.evict) == (("n1",), ())


def test_nobody_gives_way_before_its_stay_is_over():
    def evicted(served: int) -> tuple[str, ...]:
        return plan(
            snapshot(
                tenant("two", resident("t1", 100, order=1, served=99), resident("t2", 100, order=2, served=served)),
                tenant("one", resident("o1", 100, order=3, served=99)),
                tenant("new", next_run=waiting("n1")),
                max_resident_runs=3,
                min_stay=100,
            )
        ).evict

    assert evicted(99) == ()
    assert evicted(100) == ("t2",)


def test_with_more_tenants_than_places_the_one_that_has_had_most_since_it_came_gives_its_place():
    decision = plan(
        snapshot(
            tenant("long", resident("l1", 100, served=900), counter=500.0),
            tenant("short", resident("s1", 100, served=600), counter=700.0),
            tenant("new", next_run=waiting("n1")),
            max_resident_runs=2,
            min_stay=500,
        )
    )
    assert decision.evict == ("l1",)


def test_a_further_run_goes_before_anybodys_last_one():
    decision = plan(
        snapshot(
            tenant("two", resident("t1", 100, served=500), resident("t2", 100, order=2, served=500)),
            tenant("one", resident("o1", 100, served=9000)),
            tenant("new", next_run=waiting("n1")),
            max_resident_runs=3,
            min_stay=500,
        )
    )
    assert decision.evict == ("t2",)


def test_a_larger_share_has_a_longer_stay():
    def evicted(served: int) -> tuple[str, ...]:
        return plan(
            snapshot(
                tenant("large", resident("l1", 100, served=served), share=10.0),
                tenant("new", next_run=waiting("n1"), share=1.0),
                max_resident_runs=1,
                min_stay=500,
            )
        ).evict

    assert evicted(4999) == ()
    assert evicted(5000) == ("l1",)


def test_a_tiny_share_that_has_its_place_makes_nobody_stay_longer():
    clients = {"tiny": Client(share=0.01), "first": Client(share=1), "second": Client(share=1)}
    world = World(max_resident_runs=2, token_budget=400, max_microbatch_cost=100, min_stay=2000, clients=clients)
    for name in clients:
        world.submit(name, name, ENDLESS)
    while not clients["second"].served:
        world.gang()
    assert clients["first"].served <= 2000 + 2 * 400


def test_a_tiny_share_that_comes_in_now_makes_nobody_stay_longer():
    decision = plan(
        snapshot(
            tenant("holder", resident("h1", 100, served=500)),
            tenant("tiny", next_run=waiting("t1", order=1), share=0.01),
            tenant("new", next_run=waiting("n1", order=2)),
            max_resident_runs=2,
            min_stay=500,
        )
    )
    assert (decision.admit, decision.evict) == (("t1",), ("h1",))


def test_who_is_leaving_is_waited_for_and_nobody_else_goes():
    decision = plan(
        snapshot(
            tenant("two", resident("t1", 100), resident("t2", 100, leaving=True)),
            tenant("one", resident("o1", 100)),
            tenant("new", next_run=waiting("n1")),
            max_resident_runs=3,
        )
    )
    assert (decision.admit, decision.evict) == ((), ())


def test_tenants_who_take_turns_at_one_place_are_served_by_their_shares():
    shares = {"a": 1.0, "b": 2.0, "c": 5.0}
    world = World(
        max_resident_runs=1,
        token_budget=400,
        max_microbatch_cost=100,
        min_stay=2000,
        clients={name: Client(share=share) for name, share in shares.items()},
    )
    for name in shares:
        world.submit(name, name, ENDLESS)
    rounds = 10
    world.gangs(rounds * 8 * 2000 // 100)
    assert {name: world.served(name) / shares[name] for name in shares} == pytest.approx(
        dict.fromkeys(shares, rounds * 2000), abs=2000 + 400
    )


def test_more_tenants_than_places_wait_while_nobody_is_resident_yet():
    decision = plan(
        snapshot(
            tenant("a", next_run=waiting("a1", order=1)),
            tenant("b", next_run=waiting("b1", order=2)),
            max_resident_runs=1,
        )
    )
    assert (decision.admit, decision.evict) == (("a1",), ())


def test_a_tenant_with_a_resident_run_never_makes_another_give_way():
    decision = plan(
        snapshot(
            tenant("rich", resident("r1", 100), resident("r2", 100), resident("r3", 100)),
            tenant("poor", resident("p1", 100), next_run=waiting("p2")),
        )
    )
    assert decision.evict == ()


def test_nobody_becomes_resident_or_gives_way_while_draining_but_the_gang_goes_on():
    decision = plan(
        snapshot(
            tenant("a", resident("a1", 100), resident("a2", 100)),
            tenant("new", next_run=waiting("n1")),
            max_resident_runs=2,
            draining=True,
        )
    )
    assert (decision.admit, decision.evict) == ((), ())
    assert len(decision.gang) == 2
    assert plan(snapshot(tenant("new", next_run=waiting("n1")), draining=True)).admit == ()


def test_a_lower_limit_lets_the_resident_runs_finish():
    decision = plan(
        snapshot(tenant("a", resident("a1", 100), resident("a2", 100), next_run=waiting("a3")), max_resident_runs=1)
    )
    assert (decision.admit, decision.evict) == ((), ())


def test_a_run_submitted_while_others_train_rides_in_the_first_gang_after_its_admission():
    world = World(clients={name: Client(share=1) for name in ("a", "b", "c", "zed")})
    for name in "abc":
        world.submit(name, f"{name}1", HEAVY)
        world.submit(name, f"{name}2", HEAVY)
    world.gangs(30)
    world.submit("zed", "z1", HEAVY)
    assert "z1" in {slot.run_id for slot in world.gang().gang}


def test_a_run_submitted_to_a_full_server_is_resident_after_one_optimizer_step_of_who_gives_way():
    world = World(max_resident_runs=4, token_budget=400, clients={"hog": Client(share=1), "new": Client(share=1)})
    for index in range(8):
        world.submit("hog", f"h{index}", HEAVY)
    world.gangs(10)
    world.submit("new", "n1", HEAVY)
    decisions = world.gangs(14)
    assert "n1" in world.resident()
    assert {run_id for decision in decisions for run_id in decision.evict} == {"h3"}
    assert len(world.resident()) == 4


def test_a_run_that_gave_way_comes_back_without_credit_and_without_penalty():
    behind = tenant(
        "a",
        resident("a1", 100, counter=500.0),
        resident("a2", 100, counter=600.0),
        next_run=waiting("behind", counter=200.0),
    )
    ahead = tenant("b", resident("b1", 100, counter=500.0), next_run=waiting("ahead", counter=700.0))
    assert plan(snapshot(behind, ahead, max_resident_runs=5)).joins == {"behind": 500.0, "ahead": 500.0}
    assert plan(snapshot(behind, ahead, max_resident_runs=3)).joins == {}


MEMORY = {"memory_gib": 10, "token_budget": 1024, "max_resident_runs": 9}
MIB = 1 << 20


def test_a_run_becomes_resident_only_beside_a_pass_of_the_whole_budget():
    """4 + 4 GiB of runs; a pass of 1,024 tokens at 2 MiB is 2 GiB, at 3 MiB it is 3."""

    def admitted(per_token: int) -> tuple[str, ...]:
        return plan(
            snapshot(
                tenant("a", resident("a1", 100, gib=4, per_token=MIB)),
                tenant("b", next_run=waiting("b1", gib=4, per_token=per_token)),
                **MEMORY,
            )
        ).admit

    assert admitted(2 * MIB) == ("b1",)
    assert admitted(3 * MIB) == ()


def test_the_dearest_token_of_all_residents_counts():
    decision = plan(
        snapshot(
            tenant("a", resident("a1", 100, gib=4, per_token=3 * MIB)),
            tenant("b", next_run=waiting("b1", gib=4, per_token=MIB)),
            **MEMORY,
        )
    )
    assert (decision.admit, decision.waits) == ((), {"b1": Wait.MEMORY})


def test_a_copy_of_one_run_counts_whoever_is_saved():
    def admitted(copy_gib: int) -> tuple[str, ...]:
        return plan(
            snapshot(
                tenant("a", resident("a1", 100, gib=4, copy_gib=2)),
                tenant("b", next_run=waiting("b1", gib=4, copy_gib=copy_gib)),
                **MEMORY,
            )
        ).admit

    assert admitted(2) == ("b1",)
    assert admitted(3) == ()


def test_for_a_run_that_needs_the_bytes_of_two_a_second_gives_way_while_the_first_leaves():
    def evicted(gib: int) -> tuple[str, ...]:
        return plan(
            snapshot(
                tenant("a", resident("a1", 100, gib=4, leaving=True), resident("a2", 100, gib=4)),
                tenant("b", resident("b1", 100, gib=2)),
                tenant("c", next_run=waiting("c1", gib=gib)),
                **MEMORY,
            )
        ).evict

    assert evicted(4) == ()
    assert len(evicted(5)) == 1


def test_where_the_budget_follows_memory_only_the_least_pass_must_fit():
    def decision(least: int) -> Plan:
        a = tenant("a", resident("a1", 100, gib=4, per_token=4 * MIB))
        b = tenant("b", next_run=waiting("b1", gib=4, per_token=MIB))
        return plan(snapshot(a, b, least_budget=least, **MEMORY))

    assert decision(512).admit == ("b1",)
    assert decision(513).waits == {"b1": Wait.MEMORY}


def test_a_run_is_too_large_by_the_pass_of_an_empty_machine_whatever_the_heads_of_others_are():
    def decision(alone: int) -> Plan:
        a = tenant("a", resident("a1", 100, gib=1, leaving=True))
        b = tenant("b", next_run=waiting("b1", gib=9, per_token=2 * MIB))
        return plan(snapshot(a, b, least_budget=1024, least_alone=alone, **MEMORY))

    assert decision(512).waits == {"b1": Wait.MEMORY}
    assert decision(513).waits == {"b1": Wait.TOO_LARGE}


def test_a_budget_that_follows_memory_is_what_fits_between_the_least_and_the_most():
    gib = 1 << 30

    def budget(memory_gib: int) -> int:
        runs = [Footprint(resident=gib, copy=gib, per_token=MIB), Footprint(resident=gib, per_token=4 * MIB)]
        return fitting_budget(memory_gib * gib, runs, least=320, most=4096)

    assert [budget(memory_gib) for memory_gib in (3, 5, 99)] == [320, 512, 4096]
    assert fitting_budget(gib, [], least=320, most=4096) == 4096


def test_runs_give_way_until_the_one_of_a_tenant_without_any_fits():
    decision = plan(
        snapshot(
            tenant("a", *(resident(f"a{n}", 100, order=n, gib=2) for n in range(4)), counter=10.0),
            tenant("b", *(resident(f"b{n}", 100, order=n) for n in range(2)), counter=99.0),
            tenant("new", next_run=waiting("n1", gib=5)),
            **MEMORY,
        )
    )
    assert decision.evict == ("a3", "a2")


def test_what_is_free_is_kept_for_a_tenant_without_a_run_and_nobody_overtakes_it():
    decision = plan(
        snapshot(
            tenant("a", resident("a1", 100, gib=4, served=10), next_run=waiting("a2", gib=1)),
            tenant("large", next_run=waiting("l1", gib=8), counter=1.0),
            tenant("small", next_run=waiting("s1", gib=1), counter=2.0),
            min_stay=100,
            **MEMORY,
        )
    )
    assert decision.admit == ()
    assert decision.evict == ()
    assert decision.waits == {"a2": Wait.FAIR_SHARE, "l1": Wait.MEMORY, "s1": Wait.FAIR_SHARE}


def test_a_further_run_that_does_not_fit_lets_a_smaller_one_of_another_tenant_in():
    decision = plan(
        snapshot(
            tenant("a", resident("a1", 100, gib=4), next_run=waiting("a2", gib=8), counter=1.0),
            tenant("b", resident("b1", 100, gib=2), next_run=waiting("b2", gib=2), counter=2.0),
            **MEMORY,
        )
    )
    assert (decision.admit, decision.waits) == (("b2",), {"a2": Wait.MEMORY})


def test_a_run_that_no_empty_machine_could_hold_is_told_apart_and_stops_nobody():
    decision = plan(
        snapshot(
            tenant("a", resident("a1", 100), resident("a2", 100)),
            tenant("huge", next_run=waiting("h1", gib=11)),
            tenant("new", next_run=waiting("n1", gib=1), counter=5.0),
            **MEMORY,
        )
    )
    assert (decision.admit, decision.evict, decision.waits) == (("n1",), (), {"h1": Wait.TOO_LARGE})


def test_each_next_run_that_stays_out_has_a_reason():
    def waits(**circumstances: bool) -> dict[str, Wait]:
        return dict(
            plan(
                snapshot(
                    tenant("a", resident("a1", 100), next_run=waiting("a2")),
                    tenant("b", next_run=waiting("b1")),
                    max_resident_runs=1,
                    **circumstances,
                )
            ).waits
        )

    assert waits() == {"a2": Wait.FAIR_SHARE, "b1": Wait.FAIR_SHARE}
    assert waits(draining=True) == {"a2": Wait.DRAINING, "b1": Wait.DRAINING}
