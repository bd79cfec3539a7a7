"""What holds of every single plan, while tenants, the operator and the machine do what they like."""

import os
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from scheduler.plan import Plan, plan
from scheduler.snapshot import Footprint, Microbatch, Snapshot, Tenant
from tests.scheduler.simulation import Client, World
from tests.scheduler.strategies import MAX_COST, SLACK, L, shares, steps, weights

names = st.sampled_from("abcde")
footprints = st.builds(Footprint, resident=st.integers(0, 400), per_token=st.integers(0, 1))
BUDGET = 3 * L
STAY = 2 * L
MEMORY = 1000
ONLY = os.environ.get("ONLY_INVARIANT")
"""Where one is named, the others are not looked at: a mutant must be seen by its own invariant."""


def holds(condition: bool, invariant: str, otherwise: str) -> None:
    if ONLY in (None, invariant):
        assert condition, f"{invariant}: {otherwise}"


class Tenancy(RuleBasedStateMachine):
    """The names I1 to I15 are those of docs/scheduling.md."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(
            token_budget=BUDGET,
            max_microbatch_cost=MAX_COST,
            fill_min=L,
            max_resident_runs=4,
            memory=MEMORY,
            min_stay=STAY,
            clients={name: Client(share=share) for name, share in (("a", 1.0), ("b", 2.0), ("c", 0.5), ("d", 10.0))},
        )

    @rule(owners=st.sets(names, min_size=1), steps=steps, weight=weights, footprint=footprints)
    def submit(self, owners: set[str], steps: list[list[Microbatch]], weight: int, footprint: Footprint) -> None:
        for name in sorted(owners & self.world.clients.keys()):
            self.world.submit(name, f"run-{self.world.num_submitted}", steps, weight, footprint)

    @rule(share=shares)
    def arrive(self, share: float) -> None:
        self.world.clients.setdefault("e", Client(share=share))

    @rule(name=names)
    def cancel(self, name: str) -> None:
        if name in self.world.clients:
            self.world.cancel(name)

    @rule(name=names)
    def idle(self, name: str) -> None:
        """It wants no more than what is in memory."""
        if name in self.world.clients:
            self.world.clients[name].waiting.clear()

    @rule(name=names, share=shares)
    def reweight(self, name: str, share: float) -> None:
        if name in self.world.clients:
            self.world.reweight(name, share)

    @rule(name=names, cost=st.integers(1, 3 * L))
    def sample(self, name: str, cost: int) -> None:
        if name in self.world.clients:
            self.world.clients[name].sampled += cost

    @rule(draining=st.booleans())
    def drain(self, draining: bool) -> None:
        self.world.draining = draining

    @precondition(lambda self: self.world.resident())
    @rule()
    def save(self) -> None:
        for client in self.world.clients.values():
            for run in client.resident.values():
                if run.at_boundary:
                    run.save()

    @precondition(lambda self: self.world.resident())
    @rule()
    def crash(self) -> None:
        self.world.crash()

    @precondition(lambda self: self.world.resident())
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        """One run's lease ends."""
        run_id = data.draw(st.sampled_from(self.world.resident()))
        self.world.lose(next(name for name, one in self.world.clients.items() if run_id in one.resident), run_id)

    @precondition(lambda self: any(client.waiting or client.resident for client in self.world.clients.values()))
    @rule(count=st.integers(1, 12))
    def train(self, count: int) -> None:
        for _ in range(count):
            residents, served = set(self.world.resident()), self._served()
            credit = any(run.lost for client in self.world.clients.values() for run in client.waiting.values())
            length = len(self.world.history)
            self.world.gang()
            turn = self.world.history[length:]
            for snapshot, decision in turn:
                self._places_are_given_well(snapshot, decision)
            snapshot, decision = turn[-1]
            self._gang_is_filled_well(snapshot, decision)
            self._nobody_gets_ahead(snapshot, decision)
            self._what_is_trained_is_paid(snapshot, decision, self._served() - served)
            if not credit:
                holds(decision.floor >= turn[0][0].floor - SLACK, "I5", "the smallest V falls")
            if self.world.draining:
                holds(set(self.world.resident()) <= residents, "I12", "a run comes in while draining")

    def _served(self) -> int:
        return sum(client.served for client in self.world.clients.values())

    def _places_are_given_well(self, snapshot: Snapshot, decision: Plan) -> None:
        runs = {run.run_id: (one, run) for one in snapshot.tenants for run in one.resident}
        wanting = [one for one in snapshot.tenants if one.waiting and not one.resident]
        fitting = [one for one in wanting if one.waiting and fit([one.waiting.footprint])]
        least = min((one.share for one in fitting if one.waiting.run_id not in decision.admit), default=0.0)
        for run_id in decision.evict:
            tenant, run = runs[run_id]
            holds(run.served >= STAY, "I9", "it gives way before its stay is over")
            staying = [one for one in tenant.resident if not one.leaving and one.run_id not in decision.evict]
            if not staying:
                holds(run.served * least >= STAY * tenant.share, "I9", "a last run gives way too early")
        if decision.evict:
            beside = [run.footprint for _, run in runs.values() if not run.leaving]
            beside += [one.waiting.footprint for one in fitting]
            is_needed = len(beside) > snapshot.max_resident_runs or not fit(beside)
            holds(is_needed, "I9", "more give way than are wanted")

    def _gang_is_filled_well(self, snapshot: Snapshot, decision: Plan) -> None:
        taken = {slot.run_id: slot.num_microbatches for slot in decision.gang}
        offered = {run.run_id: run.microbatches for one in snapshot.tenants for run in one.resident}
        tokens = sum(one.tokens for run_id, count in taken.items() for one in offered[run_id][:count])
        holds(tokens <= BUDGET, "I1", "a gang over the budget")
        if decision.backlogged:
            first = min(decision.backlogged, key=lambda name: (before(snapshot, tenant_of(snapshot, name)), name))
            rides = {run.run_id for run in tenant_of(snapshot, first).resident} & set(taken)
            holds(rides, "I2", "the smallest V does not ride")
        if tokens < min(snapshot.fill_min, BUDGET - L + 1):
            holds(all(taken.get(run_id, 0) == len(work) for run_id, work in offered.items()), "I6", "work is left over")

    def _nobody_gets_ahead(self, snapshot: Snapshot, decision: Plan) -> None:
        """Who is ahead by more than L/w, after a crash, sampling or a new share, gets no further ahead."""
        was = {name: before(snapshot, tenant_of(snapshot, name)) for name in decision.backlogged}
        is_ = {name: after(snapshot, decision, tenant_of(snapshot, name)) for name in decision.backlogged}
        for f in decision.backlogged:
            for g in decision.backlogged:
                bound = max(MAX_COST / tenant_of(snapshot, f).share, was[f] - was[g])
                holds(is_[f] - is_[g] <= bound + SLACK, "I3", "V_f - V_g > L/w_f")

    def _what_is_trained_is_paid(self, snapshot: Snapshot, decision: Plan, served: int) -> None:
        costs = {slot.run_id: slot.cost for slot in decision.gang}
        holds(sum(costs.values()) == served, "I8", "what is charged is not what was trained")
        taken = {slot.run_id: slot.num_microbatches for slot in decision.gang}
        for name in decision.backlogged:
            one = tenant_of(snapshot, name)
            paid = after(snapshot, decision, one) - before(snapshot, one)
            due = sum(costs.get(run.run_id, 0) for run in one.resident) / one.share
            has_head = any(taken.get(run.run_id, 0) < len(run.microbatches) for run in one.resident)
            holds(paid >= due - SLACK, "I8", "a tenant pays less than it was given")
            holds(not has_head or paid <= due + SLACK, "I8", "a tenant that is not owed pays more than it was given")

    @invariant()
    def memory_is_kept(self) -> None:
        runs = [run for client in self.world.clients.values() for run in client.resident.values()]
        holds(len(runs) <= self.world.max_resident_runs, "I9", "more runs than places")
        holds(fit([run.footprint for run in runs]), "I9", "more bytes than there are")

    def teardown(self) -> None:
        """The recorded snapshots, planned again in any order of tenants, give the same plans."""
        for snapshot, decision in self.world.history:
            holds(plan(replace(snapshot, tenants=snapshot.tenants[::-1])) == decision, "I13", "another plan")


def fit(footprints: Sequence[Footprint]) -> bool:
    """Whether there are bytes for all of these runs and a pass beside them."""
    a_pass = BUDGET * max((one.per_token for one in footprints), default=0)
    return sum(one.resident for one in footprints) + a_pass <= MEMORY


def tenant_of(snapshot: Snapshot, name: str) -> Tenant:
    return next(one for one in snapshot.tenants if one.tenant_id == name)


def before(snapshot: Snapshot, tenant: Tenant) -> float:
    """Its V when the gang begins, lifted if it comes back."""
    there = [one.counter for one in snapshot.tenants if one.offers and one.backlogged]
    return tenant.counter if tenant.backlogged else max(tenant.counter, min(there, default=snapshot.floor))


def after(snapshot: Snapshot, decision: Plan, tenant: Tenant) -> float:
    """Its V when the gang ends, without what it pays for sampling."""
    return tenant.counter + decision.rises.get(tenant.tenant_id, 0.0) - tenant.sampled / tenant.share


TestTenancy = Tenancy.TestCase
TestTenancy.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
