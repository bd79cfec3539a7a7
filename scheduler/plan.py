"""The scheduler, whole: `plan(snapshot) -> Plan`. It decides and changes nothing.

Equal snapshots give equal plans, whatever the order of their tenants.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from scheduler.admission import Occupancy, Wait, admissions, evictions, joins, waits
from scheduler.fairness import TenantQueue, lifts
from scheduler.gang import fill
from scheduler.snapshot import Snapshot


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One run in the gang: its next `num_microbatches`, in order."""

    run_id: str
    num_microbatches: int
    cost: int  # of these microbatches: what its tenant pays


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do until the next plan. Every amount is an increment: add it, never overwrite a counter, but for those
    of `joins`, which take the place of what a run had, also of what is given back when it comes.

    `admit`, `joins`, `evict` and `waits` do not depend on the gang: they may be carried out first, and a plan of
    the snapshot after them made, so that who became resident rides in this very gang.
    """

    admit: tuple[str, ...]  # waiting runs that become resident now
    joins: Mapping[str, float]  # admitted run -> the counter that it begins at, where its tenant's others are
    waits: Mapping[str, Wait]  # next run of a tenant that is not admitted -> why
    evict: tuple[str, ...]  # resident runs to let go between two optimizer steps
    gang: tuple[Slot, ...]
    rises: Mapping[str, float]  # tenant -> rise of its counter: by lift, by what it pays, by what it was owed in vain
    run_rises: Mapping[str, float]  # the same of a run in the gang, or beside one
    backlogged: frozenset[str]  # tenants; the next snapshot tells it back
    floor: float  # the smallest counter among them after the gang; without any, the last one


def plan(snapshot: Snapshot) -> Plan:
    """Give the places in memory, lift who comes back, and fill the gang in order of V."""
    admitted = admissions(snapshot)
    tenants = sorted(snapshot.tenants, key=lambda one: one.tenant_id)
    lifted = lifts(tenants, snapshot.floor)
    queues = [TenantQueue.of(one, lifted.get(one.tenant_id, 0.0)) for one in tenants if one.offers]
    fill(
        queues,
        token_budget=snapshot.token_budget,
        max_cost=snapshot.max_microbatch_cost,
        fill_min=snapshot.fill_min,
    )
    floor = min((queue.counter for queue in queues), default=snapshot.floor)
    runs = [run for queue in queues for run in sorted(queue.runs, key=lambda one: one.turn[1:])]
    decision = Plan(
        admit=tuple(run.run_id for run in admitted),
        joins=joins(snapshot, admitted),
        waits=waits(snapshot, admitted),
        evict=tuple(run.run_id for run in evictions(snapshot, admitted)),
        gang=tuple(
            Slot(run_id=run.run.run_id, num_microbatches=run.num_taken, cost=run.cost) for run in runs if run.num_taken
        ),
        rises={id_: rise for id_, rise in _rises(snapshot, queues).items() if rise},
        run_rises={run.run.run_id: rise for run in runs if (rise := run.counter - run.run.counter)},
        backlogged=frozenset(queue.tenant.tenant_id for queue in queues),
        floor=floor,
    )
    _check(snapshot, decision)
    return decision


def _rises(snapshot: Snapshot, queues: list[TenantQueue]) -> dict[str, float]:
    """What was sampled is paid at once, by who does not train from the floor on: time away earns nothing here too."""
    rises = {queue.tenant.tenant_id: queue.counter - queue.tenant.counter for queue in queues}
    for tenant in snapshot.tenants:
        if tenant.sampled:
            lift = max(0.0, snapshot.floor - tenant.counter)
            rises[tenant.tenant_id] = rises.get(tenant.tenant_id, lift) + tenant.sampled / tenant.share
    return rises


def _check(snapshot: Snapshot, decision: Plan) -> None:
    """The plan keeps its own promises, or this program is wrong."""
    resident = {run.run_id: run for tenant in snapshot.tenants for run in tenant.resident}
    num_tokens = 0
    for slot in decision.gang:
        offered = resident[slot.run_id].microbatches
        assert 0 < slot.num_microbatches <= len(offered), f"{slot} takes more than the {len(offered)} offered"
        taken = offered[: slot.num_microbatches]
        num_tokens += sum(microbatch.tokens for microbatch in taken)
        assert slot.cost == sum(microbatch.cost for microbatch in taken), f"{slot} is charged wrongly"
    assert len({slot.run_id for slot in decision.gang}) == len(decision.gang), "a run rides twice"
    assert num_tokens <= snapshot.token_budget, f"{num_tokens} tokens in a budget of {snapshot.token_budget}"
    assert decision.gang or not decision.backlogged, "work is offered, but the gang is empty"
    rises = (*decision.rises.values(), *decision.run_rises.values())
    assert all(rise > 0 for rise in rises), "a counter would fall"
    if decision.admit:
        assert not snapshot.draining, "admission while draining"
        occupancy = Occupancy(snapshot, [run.footprint for run in resident.values()])
        for run in (tenant.waiting for tenant in snapshot.tenants):
            if run is not None and run.run_id in decision.admit:
                assert occupancy.fits(run), f"{run.run_id} does not fit"
                occupancy.add(run)
