"""What Hypothesis draws: microbatches, steps, shares, and tenants who come and go."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import strategies as st

from scheduler.snapshot import Microbatch
from tests.scheduler.simulation import Client, World

SLACK = 0.01
"""Counters are floats: bounds get a hundredth of a token-equivalent, no more."""
L = 120  # most tokens of a microbatch; it costs up to a quarter more
MAX_COST = 150

shares = st.sampled_from([0.01, 0.5, 1.0, 2.0, 3.0, 10.0, 1000.0])
weights = st.sampled_from([1, 4, 16])
microbatch = st.builds(
    lambda tokens, surcharge: Microbatch(tokens=tokens, cost=tokens + tokens * surcharge // 100),
    tokens=st.integers(1, L),
    surcharge=st.integers(0, 25),
)
steps = st.lists(st.lists(microbatch, min_size=1, max_size=6), min_size=1, max_size=12)
patterns = st.lists(microbatch, min_size=1, max_size=4)


def endless(pattern: Sequence[Microbatch]) -> list[list[Microbatch]]:
    """One optimizer step that no trace here can finish."""
    return [list(pattern) * (60_000 // sum(one.tokens for one in pattern))]


def brief(pattern: Sequence[Microbatch]) -> list[list[Microbatch]]:
    """Steps of one microbatch: whoever has these runs out in every gang."""
    return [[one] for one in pattern] * 500


@dataclass(frozen=True)
class Trace:
    """Tenants that never run out while they are there, others that always do, and when each leaves or comes back."""

    world: World
    patterns: dict[str, list[list[Microbatch]]]
    switches: list[set[str]] = field(default_factory=list)

    @property
    def steady(self) -> list[str]:
        """Who never runs out."""
        return [name for name in self.world.clients if name.islower()]

    def start(self, tenant_id: str, name: str) -> None:
        work = endless if tenant_id.islower() else brief
        for index, pattern in enumerate(self.patterns[tenant_id]):
            self.world.submit(tenant_id, f"{tenant_id}-{index}-{name}", work(pattern), weight=(1, 4, 16)[index])

    def switch(self, names: set[str], number: int) -> None:
        """Who is there leaves, who is not comes."""
        for tenant_id in names:
            if self.world.clients[tenant_id].resident:
                self.world.cancel(tenant_id)
            else:
                self.start(tenant_id, str(number))


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Two to four who never run out, up to two (in capitals) who do."""
    names = "abcd"[: draw(st.integers(2, 4))] + "OP"[: draw(st.integers(0, 2))]
    world = World(
        token_budget=draw(st.integers(1, 6)) * L,
        max_microbatch_cost=MAX_COST,
        fill_min=draw(st.integers(0, L)),
        max_resident_runs=99,
        clients={name: Client(share=draw(shares)) for name in names},
    )
    run_patterns = {name: draw(st.lists(patterns, min_size=1, max_size=3)) for name in names}
    switches = draw(st.lists(st.sets(st.sampled_from(names), max_size=1), min_size=40, max_size=40))
    return Trace(world, run_patterns, [set(names), *switches])
