"""Snapshots in few words, for examples."""

from scheduler.snapshot import Microbatch, ResidentRun, Snapshot, Tenant, WaitingRun


def resident(run_id: str, *sizes: int, weight: int = 1, counter: float = 0.0, order: int = 0) -> ResidentRun:
    """A resident run whose microbatches cost what they hold."""
    offered = tuple(Microbatch(tokens=size, cost=size) for size in sizes)
    return ResidentRun(run_id=run_id, weight=weight, counter=counter, order=order, microbatches=offered)


def waiting(run_id: str, *, counter: float = 0.0, order: int = 0) -> WaitingRun:
    return WaitingRun(run_id=run_id, counter=counter, order=order)


def tenant(
    tenant_id: str,
    *runs: ResidentRun,
    share: float = 1.0,
    counter: float = 0.0,
    backlogged: bool = True,
    next_run: WaitingRun | None = None,
) -> Tenant:
    return Tenant(
        tenant_id=tenant_id,
        share=share,
        counter=counter,
        backlogged=backlogged,
        resident=runs,
        waiting=next_run,
    )


def snapshot(
    *tenants: Tenant,
    token_budget: int = 400,
    max_microbatch_cost: int = 100,
    fill_min: int = 0,
    max_resident_runs: int = 4,
    floor: float = 0.0,
    draining: bool = False,
) -> Snapshot:
    return Snapshot(
        tenants=tenants,
        token_budget=token_budget,
        max_microbatch_cost=max_microbatch_cost,
        fill_min=fill_min,
        max_resident_runs=max_resident_runs,
        floor=floor,
        draining=draining,
    )
