"""What holds on every trace, whatever tenants do.

Counters are floats: bounds get a hundredth of a token-equivalent of slack, no more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from scheduler.plan import Plan, plan
from scheduler.snapshot import Microbatch, Snapshot
from tests.scheduler.simulation import Client, World

SLACK = 0.01
L = 120  # most tokens of a microbatch; it costs up to a quarter more
MAX_COST = 150

shares = st.sampled_from([0.5, 1.0, 2.0, 3.0, 10.0])
weights = st.sampled_from([1, 4, 16])
microbatch = st.builds(
    lambda tokens, surcharge: Microbatch(tokens=tokens, cost=tokens + tokens * surcharge // 100),
    tokens=st.integers(1, L),
    surcharge=st.integers(0, 25),
)
steps = st.lists(st.lists(microbatch, min_size=1, max_size=6), min_size=1, max_size=12)
patterns = st.lists(microbatch, min_size=1, max_size=4)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def smallest(snapshot: Snapshot, decision: Plan) -> str:
    """The backlogged tenant that is first in turn, after the lifts."""
    lifted = {one.tenant_id: one.counter + decision.lifts.get(one.tenant_id, 0.0) for one in snapshot.tenants}
    return min(decision.backlogged, key=lambda tenant_id: (lifted[tenant_id], tenant_id))


def endless(pattern: Sequence[Microbatch]) -> list[list[Microbatch]]:
    """One optimizer step that no trace here can finish."""
    return [list(pattern) * (60_000 // sum(one.tokens for one in pattern))]


@dataclass
class Gap:
    """How far S_f/w_f − S_g/w_g wandered while both were backlogged without a pause."""

    low: float = 0.0
    high: float = 0.0
    now: float = 0.0

    def move(self, by: float) -> None:
        self.now += by
        self.low, self.high = min(self.low, self.now), max(self.high, self.now)


@dataclass(frozen=True)
class Trace:
    """Tenants that never run out while they are there, and when they leave or come back."""

    world: World
    patterns: dict[str, list[list[Microbatch]]]
    switches: list[set[str]] = field(default_factory=list)

    def start(self, tenant_id: str, name: str) -> None:
        for index, pattern in enumerate(self.patterns[tenant_id]):
            self.world.submit(tenant_id, f"{tenant_id}-{index}-{name}", endless(pattern), weight=(1, 4, 16)[index])


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    names = "abcd"[: draw(st.integers(2, 4))]
    world = World(
        token_budget=draw(st.integers(1, 6)) * L,
        max_microbatch_cost=MAX_COST,
        fill_min=draw(st.integers(0, L)),
        clients={name: Client(share=draw(shares)) for name in names},
    )
    run_patterns = {name: draw(st.lists(patterns, min_size=1, max_size=3)) for name in names}
    switches = draw(st.lists(st.sets(st.sampled_from(names), max_size=1), min_size=40, max_size=40))
    return Trace(world, run_patterns, switches)


@quick
@given(traces())
def test_served_work_differs_by_at_most_one_microbatch_each_over_any_interval(trace: Trace):
    """I4: |S_f/w_f − S_g/w_g| ≤ L/w_f + L/w_g for tenants that do not run out."""
    world = trace.world
    gaps = {}
    for number, switched in enumerate(trace.switches):
        for tenant_id in switched if number else world.clients:
            if world.clients[tenant_id].resident:
                world.cancel(tenant_id)
            else:
                trace.start(tenant_id, str(number))
        before = {name: client.served for name, client in world.clients.items()}
        decision = world.gang()
        parts = {name: (one.served - before[name]) / one.share for name, one in world.clients.items()}
        for f, g in combinations(world.clients, 2):
            if {f, g} <= decision.backlogged:
                gap = gaps.setdefault((f, g), Gap())
                gap.move(parts[f] - parts[g])
                bound = MAX_COST / world.clients[f].share + MAX_COST / world.clients[g].share
                assert gap.high - gap.low <= bound + SLACK
            else:
                gaps.pop((f, g), None)


@quick
@given(patterns=st.lists(patterns, min_size=3, max_size=3), budget=st.integers(1, 6))
def test_a_tenants_runs_share_by_priority_within_the_same_bound(patterns: list[list[Microbatch]], budget: int):
    world = World(token_budget=budget * L, max_microbatch_cost=MAX_COST, clients={"a": Client(share=2.0)})
    for weight, pattern in zip((1, 4, 16), patterns, strict=True):
        world.submit("a", f"weight-{weight}", endless(pattern), weight=weight)
    world.gangs(3)
    runs = list(world.clients["a"].resident.values())
    before = {run.run_id: run.served for run in runs}
    gaps = {pair: Gap() for pair in combinations(range(3), 2)}
    for _ in range(40):
        world.gang()
        parts = [(run.served - before[run.run_id]) / run.weight for run in runs]
        before = {run.run_id: run.served for run in runs}
        for (f, g), gap in gaps.items():
            gap.move(parts[f] - parts[g])
            assert gap.high - gap.low <= MAX_COST / runs[f].weight + MAX_COST / runs[g].weight + SLACK


class Tenancy(RuleBasedStateMachine):
    """Tenants submit, cancel and change share; the operator drains; the daemon dies; gangs go on."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(
            token_budget=3 * L,
            max_microbatch_cost=MAX_COST,
            fill_min=L,
            max_resident_runs=4,
            clients={name: Client(share=1.0) for name in "abcde"},
        )
        self.lowest_share = dict.fromkeys("abcde", 1.0)

    @rule(name=st.sampled_from("abcde"), steps=steps, weight=weights)
    def submit(self, name: str, steps: list[list[Microbatch]], weight: int) -> None:
        self.world.submit(name, f"run-{self.world.num_submitted}", steps, weight=weight)

    @rule(name=st.sampled_from("abcde"))
    def cancel(self, name: str) -> None:
        self.world.cancel(name)

    @rule(name=st.sampled_from("abcde"), share=shares)
    def change_share(self, name: str, share: float) -> None:
        """I11: a counter does not move."""
        self.world.clients[name].share = share
        self.lowest_share[name] = min(share, self.lowest_share[name])

    @rule(draining=st.booleans())
    def drain(self, draining: bool) -> None:
        self.world.draining = draining

    @rule()
    def crash(self) -> None:
        self.world.crash()

    @precondition(lambda self: any(client.waiting or client.resident for client in self.world.clients.values()))
    @rule(count=st.integers(1, 4))
    def train(self, count: int) -> None:
        for _ in range(count):
            floor, residents = self.world.floor, set(self.world.resident())
            self.world.gang()
            snapshot, decision = self.world.history[-1]
            self._gang_is_within_its_limits(snapshot, decision)
            assert self.world.floor >= floor - SLACK  # I5
            if self.world.draining:
                assert set(self.world.resident()) <= residents  # I12
            self._nobody_is_ahead_of_the_bound(decision)

    def _gang_is_within_its_limits(self, snapshot: Snapshot, decision: Plan) -> None:
        offered = {run.run_id: run.microbatches for one in snapshot.tenants for run in one.resident}
        taken = {slot.run_id: offered[slot.run_id][: slot.num_microbatches] for slot in decision.gang}
        tokens = sum(one.tokens for microbatches in taken.values() for one in microbatches)
        assert tokens <= snapshot.token_budget  # I1
        if decision.backlogged:
            first = smallest(snapshot, decision)
            runs = next(one.resident for one in snapshot.tenants if one.tenant_id == first)
            assert {run.run_id for run in runs} & set(taken)  # I2 and I6
        free = {slot.run_id for slot in decision.gang if slot.charged < sum(one.cost for one in taken[slot.run_id])}
        if free:  # I8: only to reach fill_min
            assert any(tokens - taken[run_id][-1].tokens < snapshot.fill_min for run_id in free)

    def _nobody_is_ahead_of_the_bound(self, decision: Plan) -> None:
        """I3: V_f − V_g ≤ L/w_f, for who has run out as well. A past, smaller share may still show."""
        for name in decision.backlogged:
            ahead = self.world.clients[name].counter - decision.floor
            assert ahead <= MAX_COST / self.lowest_share[name] + SLACK

    @invariant()
    def places_are_kept(self) -> None:
        assert len(self.world.resident()) <= self.world.max_resident_runs

    def teardown(self) -> None:
        """I13: the recorded snapshots, planned again in any order of tenants, give the same plans."""
        for snapshot, decision in self.world.history:
            assert plan(replace(snapshot, tenants=snapshot.tenants[::-1])) == decision


TestTenancy = Tenancy.TestCase
TestTenancy.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@quick
@given(loads=st.lists(st.tuples(st.sampled_from("abcd"), steps, weights), min_size=1, max_size=10))
def test_every_run_is_finished_whoever_competes(loads: list[tuple[str, list[list[Microbatch]], int]]):
    """I6: a gang with work is never empty, so all is done after as many gangs as microbatches."""
    world = World(
        token_budget=2 * L,
        max_microbatch_cost=MAX_COST,
        max_resident_runs=3,
        clients={n: Client(share=1) for n in "abcd"},
    )
    for number, (name, steps_, weight) in enumerate(loads):
        world.submit(name, f"run-{number}", steps_, weight=weight)
    num_microbatches = sum(len(step) for _, steps_, _ in loads for step in steps_)
    world.gangs(num_microbatches)
    assert sum(client.served for client in world.clients.values()) == sum(
        one.cost for _, steps_, _ in loads for step in steps_ for one in step
    )


@quick
@given(
    steps_of_others=st.lists(steps, min_size=4, max_size=8),
    owners=st.lists(st.sampled_from("abc"), min_size=8, max_size=8),
)
def test_a_tenant_that_submits_to_a_busy_server_soon_trains(
    steps_of_others: list[list[list[Microbatch]]], owners: list[str]
):
    """With a place for each tenant, its run is resident after at most one optimizer step of who gives way."""
    world = World(
        token_budget=4 * L,
        max_microbatch_cost=MAX_COST,
        max_resident_runs=4,
        clients={n: Client(share=1) for n in "abcz"},
    )
    for number, (owner, steps_) in enumerate(zip(owners, steps_of_others, strict=False)):
        world.submit(owner, f"run-{number}", steps_ * 4)
    world.gangs(8)
    world.submit("z", "newcomer", [[Microbatch(tokens=L, cost=L)]] * 50)
    num_gangs = 0
    while "newcomer" not in world.resident():
        world.gang()
        num_gangs += 1
        assert num_gangs < 60, "it waits for ever"
    rode = "newcomer" in {slot.run_id for slot in world.history[-1][1].gang}
    assert rode or "newcomer" in {slot.run_id for slot in world.gang().gang}
