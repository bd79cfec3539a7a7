"""The scheduler, whole: `plan(snapshot) -> Plan`. It decides and changes nothing.

Equal snapshots give equal plans, whatever the order of their tenants.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from scheduler.admission import admissions, evictions, run_lifts
from scheduler.fairness import TenantQueue, lifts
from scheduler.gang import fill
from scheduler.snapshot import Snapshot


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One run in the gang: its next `num_microbatches`, in order."""

    run_id: str
    num_microbatches: int
    charged: int  # cost that its tenant pays; less than the microbatches cost when some ride free


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do until the next plan. Every amount is an increment: add it, never overwrite a counter.

    `admit`, `run_lifts` and `evict` do not depend on the gang: they may be carried out first, and a plan of
    the snapshot after them made, so that who became resident rides in this very gang.
    """

    admit: tuple[str, ...]  # waiting runs that become resident now
    evict: tuple[str, ...]  # resident runs to let go between two optimizer steps, unless a later plan differs
    gang: tuple[Slot, ...]
    lifts: Mapping[str, float]  # tenant -> rise of its counter on becoming backlogged
    run_lifts: Mapping[str, float]  # admitted run -> rise of its counter
    charges: Mapping[str, float]  # tenant -> cost / share of its charged microbatches
    run_charges: Mapping[str, float]  # run -> cost / weight of its charged microbatches
    backlogged: frozenset[str]  # tenants; the next snapshot tells it back
    floor: float  # the smallest counter among them after the charges; without any, the last one


def plan(snapshot: Snapshot) -> Plan:
    """Give the places in memory, lift who comes back, and fill the gang in order of V."""
    admitted = admissions(snapshot)
    tenants = {tenant.tenant_id: tenant for tenant in sorted(snapshot.tenants, key=lambda one: one.tenant_id)}
    lifted = lifts(tenants.values(), snapshot.floor)
    backlogged = {
        tenant_id: TenantQueue.of(tenant, lifted.get(tenant_id, 0.0))
        for tenant_id, tenant in tenants.items()
        if tenant.offers
    }
    fill(
        list(backlogged.values()),
        token_budget=snapshot.token_budget,
        max_cost=snapshot.max_microbatch_cost,
        fill_min=snapshot.fill_min,
    )
    riding = [run for queue in backlogged.values() for run in queue.runs if run.num_taken]
    decision = Plan(
        admit=tuple(run.run_id for run in admitted),
        evict=tuple(run.run_id for run in evictions(snapshot, admitted)),
        gang=tuple(Slot(run_id=run.run.run_id, num_microbatches=run.num_taken, charged=run.charged) for run in riding),
        lifts=lifted,
        run_lifts=run_lifts(snapshot, admitted),
        charges={tenant_id: queue.charge for tenant_id, queue in backlogged.items() if queue.charge},
        run_charges={run.run.run_id: run.charge for run in riding if run.charge},
        backlogged=frozenset(backlogged),
        floor=min((queue.counter for queue in backlogged.values()), default=snapshot.floor),
    )
    _check(snapshot, decision)
    return decision


def _check(snapshot: Snapshot, decision: Plan) -> None:
    """The plan keeps its own promises, or this program is wrong."""
    resident = {run.run_id: run for tenant in snapshot.tenants for run in tenant.resident}
    num_tokens = 0
    for slot in decision.gang:
        offered = resident[slot.run_id].microbatches
        assert 0 < slot.num_microbatches <= len(offered), f"{slot} takes more than the {len(offered)} offered"
        taken = offered[: slot.num_microbatches]
        num_tokens += sum(microbatch.tokens for microbatch in taken)
        assert slot.charged <= sum(microbatch.cost for microbatch in taken), f"{slot} is charged too much"
    assert len({slot.run_id for slot in decision.gang}) == len(decision.gang), "a run rides twice"
    assert num_tokens <= snapshot.token_budget, f"{num_tokens} tokens in a budget of {snapshot.token_budget}"
    assert decision.gang or not decision.backlogged, "work is offered, but the gang is empty"
    amounts = (decision.lifts, decision.run_lifts, decision.charges, decision.run_charges)
    assert all(amount > 0 for amounts_ in amounts for amount in amounts_.values()), "a counter would fall"
    if decision.admit:
        assert not snapshot.draining, "admission while draining"
        assert len(resident) + len(decision.admit) <= snapshot.max_resident_runs, "more runs than places"
    for tenant in snapshot.tenants:
        kept = [run for run in tenant.resident if run.run_id not in decision.evict]
        assert kept or not tenant.resident, f"{tenant.tenant_id} would lose its last resident run"
