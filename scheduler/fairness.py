"""Start-time fair queueing with bounded backfill, and the lift of who comes back.

One rule serves both levels: tenants share the machine, and a tenant's runs share what is the tenant's.
Each queue has a weight and a counter V = cost charged / weight; the smallest V is next.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from scheduler.snapshot import Microbatch, ResidentRun, Tenant


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a head must satisfy to be taken now."""

    room: int  # tokens left in the gang
    max_cost: int  # L, the bound: nobody gets further ahead of the smallest V than L / weight
    bounded: bool = True  # False: any head that fits


class Queue(Protocol):
    """What takes turns by V: a run among its tenant's, or a tenant among all."""

    @property
    def weight(self) -> float:
        """Its part, against its neighbours'."""

    @property
    def counter(self) -> float:
        """V, with what the gang has charged so far."""

    @property
    def turn(self) -> tuple[Any, ...]:
        """The sort key: V, then what settles a tie."""

    def pick(self, rule: Rule) -> "RunQueue | None":
        """The run of this queue whose head is next under `rule`."""


@dataclass(kw_only=True)
class RunQueue:
    """A run that offers microbatches, while a gang fills."""

    run: ResidentRun
    num_taken: int = 0  # microbatches in the gang
    charged: int = 0  # cost of those that are charged

    @property
    def weight(self) -> float:
        return self.run.weight

    @property
    def charge(self) -> float:
        """By how much the gang raises its counter."""
        return self.charged / self.weight

    @property
    def counter(self) -> float:
        return self.run.counter + self.charge

    @property
    def turn(self) -> tuple[float, int, str]:
        return self.counter, self.run.order, self.run.run_id

    @property
    def head(self) -> Microbatch:
        """Its next microbatch, while it has not run out."""
        return self.run.microbatches[self.num_taken]

    def pick(self, rule: Rule) -> "RunQueue | None":
        """Itself, if it has a head and that fits."""
        has_head = self.num_taken < len(self.run.microbatches)
        return self if has_head and self.head.tokens <= rule.room else None

    def take(self, *, charge: bool) -> int:
        """Put the head into the gang; its tokens."""
        head = self.head
        self.num_taken += 1
        self.charged += head.cost if charge else 0
        return head.tokens


@dataclass(kw_only=True)
class TenantQueue:
    """A backlogged tenant, while a gang fills. When its runs have run out it is owed: its V still counts."""

    tenant: Tenant
    lift: float
    runs: list[RunQueue]

    @classmethod
    def of(cls, tenant: Tenant, lift: float) -> "TenantQueue":
        """The runs that offer something, in order of submission; none of it taken yet."""
        offering = [RunQueue(run=run) for run in tenant.resident if run.microbatches]
        return cls(tenant=tenant, lift=lift, runs=sorted(offering, key=lambda run: run.turn[1:]))

    @property
    def weight(self) -> float:
        return self.tenant.share

    @property
    def charge(self) -> float:
        """By how much the gang raises its counter, after the lift."""
        return sum(run.charged for run in self.runs) / self.weight

    @property
    def counter(self) -> float:
        return self.tenant.counter + self.lift + self.charge

    @property
    def turn(self) -> tuple[float, str]:
        return self.counter, self.tenant.tenant_id

    def pick(self, rule: Rule) -> RunQueue | None:
        """The run of its own whose head is next."""
        return pick(self.runs, rule)


def pick(queues: Sequence[Queue], rule: Rule) -> RunQueue | None:
    """The run whose head is next: of the smallest V whose head fits, V + cost/weight ≤ smallest V + L/weight.

    The smallest V of all always satisfies the bound; a larger one that does is backfill. Written as a
    difference of counters, so that no rounding can refuse the smallest.
    """
    in_turn = sorted(queues, key=lambda queue: queue.turn)
    for queue in in_turn:
        run = queue.pick(rule)
        if run is None:
            continue
        ahead = queue.counter - in_turn[0].counter
        if not rule.bounded or ahead <= (rule.max_cost - run.head.cost) / queue.weight:
            return run
    return None


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
