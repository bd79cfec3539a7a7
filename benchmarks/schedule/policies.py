"""The scheduler under test, and those that it is set against. Each is a function of the same snapshot."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scheduler.admission import admissions, evictions, joins
from scheduler.fairness import RunQueue, TenantQueue, lifts
from scheduler.plan import Plan, Slot, plan
from scheduler.snapshot import Microbatch, ResidentRun, Snapshot, WaitingRun


@dataclass(frozen=True)
class Policy:
    """A scheduler, and which tenants without a resident run it wants to see first."""

    name: str
    plan: Callable[[Snapshot], Plan]
    by_submission: bool = False  # else by counter, as the daemon's query does


def round_robin(snapshot: Snapshot) -> Plan:
    """A microbatch for each tenant in turn: the rule with all costs and shares equal."""
    tenants = tuple(
        replace(tenant, share=1.0, resident=tuple(_at_one_price(run) for run in tenant.resident))
        for tenant in snapshot.tenants
    )
    return plan(replace(snapshot, tenants=tenants, max_microbatch_cost=1))


def open_backfill(snapshot: Snapshot) -> Plan:
    """Start-time fair queueing in which whatever fits may ride. Places as ours."""
    return _by_counter(snapshot, backfill=True)


def strict(snapshot: Snapshot) -> Plan:
    """Start-time fair queueing without backfill: the gang closes when the next head does not fit. Places as ours."""
    return _by_counter(snapshot, backfill=False)


def _by_counter(snapshot: Snapshot, *, backfill: bool) -> Plan:
    """The smallest counter first; who runs out is not waited for, and comes back without a credit."""
    lifted = lifts(snapshot.tenants, snapshot.floor)
    queues = [TenantQueue.of(one, lifted.get(one.tenant_id, 0.0)) for one in snapshot.tenants if one.offers]
    room = snapshot.token_budget
    while heads := [(queue.turn, run.turn, queue, run) for queue in queues for run in queue.runs if run.has_head]:
        fitting = [one for one in heads if one[3].head.tokens <= room]
        first = min(heads, key=_turns)
        if not fitting or (not backfill and first not in fitting):
            break
        _, _, tenant, run = min(fitting, key=_turns)
        room -= _take(tenant, run)
    last = max((queue.counter for queue in queues), default=0.0)
    smallest = min((queue.counter for queue in queues if queue.has_head), default=last)
    for queue in queues:
        queue.counter = max(queue.counter, smallest)
    admitted = admissions(snapshot)
    return _decision(
        snapshot,
        queues,
        admit=tuple(run.run_id for run in admitted),
        joins=joins(snapshot, admitted),
        evict=tuple(run.run_id for run in evictions(snapshot, admitted)),
    )


def fifo(snapshot: Snapshot) -> Plan:
    """First come, first served, for places as for gangs; what fits rides."""
    queues = [TenantQueue.of(one, 0.0) for one in snapshot.tenants if one.offers]
    room = snapshot.token_budget
    for tenant, run in sorted(((one, run) for one in queues for run in one.runs), key=lambda pair: pair[1].run.order):
        while run.has_head and run.head.tokens <= room:
            room -= _take(tenant, run)
    has_place = sum(len(tenant.resident) for tenant in snapshot.tenants) < snapshot.max_resident_runs
    first = min((one.waiting for one in snapshot.tenants if one.waiting), key=_by_order, default=None)
    admit = (first.run_id,) if first and has_place else ()
    return _decision(snapshot, queues, admit=admit, joins={}, evict=())


POLICIES = (
    Policy("mixloom", plan),
    Policy("open backfill", open_backfill),
    Policy("strict fair queueing", strict),
    Policy("round-robin by tenant", round_robin),
    Policy("FIFO", fifo, by_submission=True),
)


def _turns(head: tuple[Any, Any, TenantQueue, RunQueue]) -> tuple[Any, Any]:
    return head[:2]


def _by_order(run: WaitingRun) -> int:
    return run.order


def _at_one_price(run: ResidentRun) -> ResidentRun:
    return replace(run, microbatches=tuple(Microbatch(tokens=one.tokens, cost=1) for one in run.microbatches))


def _take(tenant: TenantQueue, run: RunQueue) -> int:
    """Its head rides and is charged; the head's tokens."""
    head = run.head
    run.num_taken += 1
    run.cost += head.cost
    run.counter += head.cost / run.weight
    tenant.counter += head.cost / tenant.weight
    return head.tokens


def _decision(snapshot: Snapshot, queues: Sequence[TenantQueue], **places: Any) -> Plan:
    runs = [run for queue in queues for run in queue.runs if run.num_taken]
    return Plan(
        **places,
        waits={},
        gang=tuple(Slot(run_id=run.run.run_id, num_microbatches=run.num_taken, cost=run.cost) for run in runs),
        rises={queue.tenant.tenant_id: queue.counter - queue.tenant.counter for queue in queues},
        run_rises={run.run.run_id: run.counter - run.run.counter for run in runs},
        backlogged=frozenset(queue.tenant.tenant_id for queue in queues),
        floor=min((queue.counter for queue in queues), default=snapshot.floor),
    )
