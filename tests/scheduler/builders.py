"""Snapshots in few words, for examples."""

from scheduler.snapshot import Footprint, Microbatch, ResidentRun, Snapshot, Tenant, WaitingRun


def resident(
    run_id: str,
    *sizes: int,
    weight: int = 1,
    counter: float = 0.0,
    order: int = 0,
    served: int = 0,
    leaving: bool = False,
    gib: int = 0,
    copy_gib: int = 0,
    per_token: int = 0,
) -> ResidentRun:
    """A resident run whose microbatches cost what they hold."""
    return ResidentRun(
        run_id=run_id,
        weight=weight,
        counter=counter,
        order=order,
        microbatches=tuple(Microbatch(tokens=size, cost=size) for size in sizes),
        served=served,
        leaving=leaving,
        footprint=Footprint(resident=gib << 30, copy=copy_gib << 30, per_token=per_token),
    )


def waiting(
    run_id: str, *, counter: float = 0.0, order: int = 0, gib: int = 0, copy_gib: int = 0, per_token: int = 0
) -> WaitingRun:
    footprint = Footprint(resident=gib << 30, copy=copy_gib << 30, per_token=per_token)
    return WaitingRun(run_id=run_id, counter=counter, order=order, footprint=footprint)


def tenant(
    tenant_id: str,
    *runs: ResidentRun,
    share: float = 1.0,
    counter: float = 0.0,
    backlogged: bool = True,
    next_run: WaitingRun | None = None,
    sampled: int = 0,
) -> Tenant:
    return Tenant(
        tenant_id=tenant_id,
        share=share,
        counter=counter,
        backlogged=backlogged,
        resident=runs,
        waiting=next_run,
        sampled=sampled,
    )


def snapshot(
    *tenants: Tenant,
    token_budget: int = 400,
    max_microbatch_cost: int = 100,
    fill_min: int = 0,
    max_resident_runs: int = 4,
    least_budget: int | None = None,
    least_alone: int | None = None,
    memory_gib: int | None = None,
    min_stay: int = 0,
    floor: float = 0.0,
    draining: bool = False,
) -> Snapshot:
    return Snapshot(
        tenants=tenants,
        token_budget=token_budget,
        max_microbatch_cost=max_microbatch_cost,
        fill_min=fill_min,
        max_resident_runs=max_resident_runs,
        least_budget=least_budget,
        least_alone=least_alone,
        memory=None if memory_gib is None else memory_gib << 30,
        min_stay=min_stay,
        floor=floor,
        draining=draining,
    )
