"""Start-time fair queueing with bounded backfill, and the lift of who comes back.

One rule serves both levels: tenants share the machine, and a tenant's runs share what is the tenant's.
Each queue has a weight and a counter V = cost charged / weight; the smallest V is next.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol

from scheduler.snapshot import Microbatch, ResidentRun, Tenant


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a head must satisfy to be taken now."""

    room: int  # tokens left in the gang
    max_cost: int  # L, the bound: nobody gets further ahead of the smallest V than L / weight
    waits_for_owed: bool = True  # whether the V of who has run out counts among the smallest


class Queue(Protocol):
    """What takes turns by V: a run among its tenant's, or a tenant among all."""

    counter: float  # V, with what the gang has charged so far

    @property
    def weight(self) -> float:
        """Its part, against its neighbours'."""

    @property
    def turn(self) -> tuple[Any, ...]:
        """The sort key: V, then what settles a tie."""

    @property
    def has_head(self) -> bool:
        """Whether it has a microbatch left to give; who has none is owed until the gang ends."""

    def pick(self, rule: Rule) -> "RunQueue | None":
        """The run of this queue whose head is next under `rule`."""


@dataclass(kw_only=True)
class RunQueue:
    """A run that offers microbatches, while a gang fills."""

    run: ResidentRun
    counter: float
    num_taken: int = 0  # microbatches in the gang
    cost: int = 0  # theirs

    @property
    def weight(self) -> float:
        return self.run.weight

    @property
    def turn(self) -> tuple[float, int, str]:
        return self.counter, self.run.order, self.run.run_id

    @property
    def has_head(self) -> bool:
        return self.num_taken < len(self.run.microbatches)

    @property
    def head(self) -> Microbatch:
        """Its next microbatch."""
        return self.run.microbatches[self.num_taken]

    def pick(self, rule: Rule) -> "RunQueue | None":
        """Itself, if it has a head and that fits."""
        return self if self.has_head and self.head.tokens <= rule.room else None


@dataclass(kw_only=True)
class TenantQueue:
    """A backlogged tenant, while a gang fills."""

    tenant: Tenant
    counter: float
    runs: list[RunQueue]

    @classmethod
    def of(cls, tenant: Tenant, lift: float) -> "TenantQueue":
        """With the runs that offer something, none of it taken yet."""
        offering = [RunQueue(run=run, counter=run.counter) for run in tenant.resident if run.microbatches]
        return cls(tenant=tenant, counter=tenant.counter + lift, runs=offering)

    @property
    def weight(self) -> float:
        return self.tenant.share

    @property
    def turn(self) -> tuple[float, str]:
        return self.counter, self.tenant.tenant_id

    @property
    def has_head(self) -> bool:
        return any(run.has_head for run in self.runs)

    def pick(self, rule: Rule) -> RunQueue | None:
        """The run of its own whose head is next."""
        return pick(self.runs, rule)


def pick(queues: Sequence[Queue], rule: Rule) -> RunQueue | None:
    """The run whose head is next: of the smallest V whose head fits, V + cost/weight ≤ smallest V + L/weight.

    The smallest V of all always satisfies the bound; a larger one that does is backfill. Written as a
    difference of counters, so that no rounding can refuse the smallest.
    """
    in_turn = sorted([q for q in queues if rule.waits_for_owed or q.has_head], key=attrgetter("turn"))
    for queue in in_turn:
        run = queue.pick(rule)
        if run and queue.counter - in_turn[0].counter <= (rule.max_cost - run.head.cost) / queue.weight:
            return run
    return None


def take_along(queues: Iterable[Queue], ahead: Queue, cost: int, max_cost: int) -> None:
    """Raise V of who is owed by as much of `cost`, just charged to `ahead`, as went past the bound against it.

    Against them that much rides free. Who has heads is never that far behind: among them everything is charged.
    """
    for queue in queues:
        past = ahead.counter - queue.counter - max_cost / ahead.weight
        queue.counter += max(0.0, min(past, cost / ahead.weight))


def lifts(tenants: Iterable[Tenant], floor: float) -> dict[str, float]:
    """By how much V rises for each tenant that becomes backlogged: no credit for the time away.

    To the smallest V among those that stay backlogged; without any, to `floor`, the last such value.
    """
    backlogged = [tenant for tenant in tenants if tenant.offers]
    target = min((tenant.counter for tenant in backlogged if tenant.backlogged), default=floor)
    return {
        tenant.tenant_id: target - tenant.counter
        for tenant in backlogged
        if not tenant.backlogged and tenant.counter < target
    }
