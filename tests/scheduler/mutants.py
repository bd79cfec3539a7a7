"""A fault for each invariant: a patch of the scheduler, and the test that must see it (`test_mutants.py`)."""

from dataclasses import dataclass

INVARIANTS = "tests/scheduler/test_invariants.py"
TENANCY = "tests/scheduler/test_tenancy.py::TestTenancy"


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """`before` stands once in `file`; with `after` in its place `test` fails."""

    invariant: str
    fault: str
    file: str
    before: str
    after: str
    test: str


MUTANTS = [
    Mutant(
        invariant="I1",
        fault="a head is taken if there is any room at all",
        file="fairness.py",
        before="self.head.tokens <= rule.room",
        after="rule.room > 0",
        test=TENANCY,
    ),
    Mutant(
        invariant="I2",
        fault="tenants take turns by name",
        file="fairness.py",
        before="return self.counter, self.tenant.tenant_id",
        after="return 0.0, self.tenant.tenant_id",
        test=TENANCY,
    ),
    Mutant(
        invariant="I3",
        fault="backfill without a bound",
        file="fairness.py",
        before="queue.counter - in_turn[0].counter <= (rule.max_cost - run.head.cost) / queue.weight",
        after="True",
        test=TENANCY,
    ),
    Mutant(
        invariant="I3",
        fault="who has run out is not owed",
        file="fairness.py",
        before="if rule.waits_for_owed or q.has_head]",
        after="if q.has_head]",
        test=TENANCY,
    ),
    Mutant(
        invariant="I4",
        fault="heads taken to reach fill_min are not charged",
        file="gang.py",
        before="tenant.counter += head.cost / tenant.weight",
        after="tenant.counter += head.cost / tenant.weight if rule.waits_for_owed else 0.0",
        test=f"{INVARIANTS}::test_served_work_differs_by_at_most_one_microbatch_each_over_any_interval",
    ),
    Mutant(
        invariant="I5",
        fault="time away is credit",
        file="fairness.py",
        before="if not tenant.backlogged and tenant.counter < target",
        after="if False",
        test=TENANCY,
    ),
    Mutant(
        invariant="I6",
        fault="a gang that closes early is left as small as it is",
        file="gang.py",
        before="least_room=token_budget - fill_min",
        after="least_room=token_budget",
        test=TENANCY,
    ),
    Mutant(
        invariant="I7",
        fault="a tenant's runs take turns by submission",
        file="fairness.py",
        before="return self.counter, self.run.order, self.run.run_id",
        after="return 0.0, self.run.order, self.run.run_id",
        test=f"{INVARIANTS}::test_every_run_that_offers_something_rides_by_the_gang_that_was_promised",
    ),
    Mutant(
        invariant="I7",
        fault="nobody gives way",
        file="admission.py",
        before="            evicted.append(victim)",
        after="            pass",
        test=f"{INVARIANTS}::test_a_tenant_that_submits_to_a_busy_server_soon_trains",
    ),
    Mutant(
        invariant="I7",
        fault="places are given by submission",
        file="admission.py",
        before="return bool(tenant.resident), tenant.counter, order, tenant.tenant_id",
        after="return bool(tenant.resident), 0.0, order, tenant.tenant_id",
        test=f"{INVARIANTS}::test_a_tenant_without_a_place_waits_for_at_most_one_stay_of_each_other",
    ),
    Mutant(
        invariant="I8",
        fault="microbatches are charged by their tokens",
        file="gang.py",
        before="run.cost += head.cost",
        after="run.cost += head.tokens",
        test=TENANCY,
    ),
    Mutant(
        invariant="I8",
        fault="all that rides to reach fill_min is charged to everybody",
        file="fairness.py",
        before="max(0.0, min(past, cost / ahead.weight))",
        after="cost / ahead.weight",
        test=TENANCY,
    ),
    Mutant(
        invariant="I9",
        fault="a pass takes no memory",
        file="admission.py",
        before="return a_pass <= _left(",
        after="return 0 <= _left(",
        test=TENANCY,
    ),
    Mutant(
        invariant="I9",
        fault="a last run may go as early as a further one",
        file="admission.py",
        before="run.served * min(least, one.share) >= snapshot.min_stay * one.share",
        after="run.served >= snapshot.min_stay",
        test=TENANCY,
    ),
    Mutant(
        invariant="I10",
        fault="the last microbatch of a run is left out unless it was the first to be submitted",
        file="fairness.py",
        before="return self.num_taken < len(self.run.microbatches)",
        after="return self.num_taken < len(self.run.microbatches) - (self.run.order > 1)",
        test=f"{INVARIANTS}::test_the_order_in_which_jobs_are_submitted_changes_when_they_train_and_not_on_what",
    ),
    Mutant(
        invariant="I11",
        fault="a new share counts for what was charged before",
        file="fairness.py",
        before="counter=tenant.counter + lift",
        after="counter=tenant.counter / tenant.share + lift",
        test=f"{INVARIANTS}::test_a_new_share_counts_from_now_on",
    ),
    Mutant(
        invariant="I12",
        fault="a drain lets runs in",
        file="admission.py",
        before="    if snapshot.draining:\n        return []\n    occupancy",
        after="    occupancy",
        test=f"{INVARIANTS}::test_a_drain_lets_no_run_in_and_comes_to_an_end",
    ),
    Mutant(
        invariant="I13",
        fault="the plan depends on the order in which the snapshot lists tenants",
        file="plan.py",
        before="tenants = sorted(snapshot.tenants, key=lambda one: one.tenant_id)",
        after="tenants = list(snapshot.tenants)",
        test=TENANCY,
    ),
    Mutant(
        invariant="I14",
        fault="a tenant of many runs counts as many tenants",
        file="fairness.py",
        before="return self.tenant.share",
        after="return self.tenant.share * len(self.runs)",
        test=f"{INVARIANTS}::test_work_that_is_split_into_many_runs_gets_no_more",
    ),
    Mutant(
        invariant="I15",
        fault="a run that was far behind elsewhere has a credit here",
        file="admission.py",
        before="] = least",
        after="] = min(least, tenant.waiting.counter)",
        test=f"{INVARIANTS}::test_a_run_that_was_elsewhere_shares_with_its_siblings_from_when_it_comes",
    ),
    Mutant(
        invariant="I15",
        fault="a run that was far ahead elsewhere waits for its siblings here",
        file="admission.py",
        before="] = least",
        after="] = max(least, tenant.waiting.counter)",
        test=f"{INVARIANTS}::test_a_run_that_was_elsewhere_shares_with_its_siblings_from_when_it_comes",
    ),
]
