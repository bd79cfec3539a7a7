"""Who becomes resident, and who gives way."""

from scheduler.plan import plan
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


def test_who_has_never_used_the_server_does_not_overtake_who_came_before():
    """Both would be lifted to the floor, so submission decides, not an old counter."""
    decision = plan(
        snapshot(
            tenant("fresh", next_run=waiting("f1", order=8), counter=0.0),
            tenant("old", next_run=waiting("o1", order=7), counter=100.0),
            floor=1000.0,
            max_resident_runs=1,
        )
    )
    assert decision.admit == ("o1",)


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


def test_nobody_gives_up_the_last_resident_run():
    decision = plan(
        snapshot(
            tenant("a", resident("a1", 100)),
            tenant("b", resident("b1", 100)),
            tenant("new", next_run=waiting("n1")),
            max_resident_runs=2,
        )
    )
    assert (decision.admit, decision.evict) == ((), ())


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
    assert plan(snapshot(behind, ahead, max_resident_runs=5)).run_lifts == {"behind": 300.0}
    assert plan(snapshot(behind, ahead, max_resident_runs=3)).run_lifts == {}
