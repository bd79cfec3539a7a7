"""What the scheduler may see: the resident runs, and of each tenant its share, counter and next waiting job."""

from collections.abc import Collection, Mapping

from scheduler.snapshot import Microbatch, ResidentRun, Snapshot, Tenant, WaitingRun
from server.daemon.books import Books
from server.daemon.program import Work
from server.daemon.roster import Resident
from server.db import runs
from server.settings import Settings

FILL_MIN_TOKENS = 320
"""A matmul of so many rows reaches 95 % of its speed (docs/design.md)."""


def cost_of(resident: Resident, work: Work, *, opens_step: bool) -> int:
    """Token-equivalents of a microbatch; the first one of a step carries its optimizer and its checkpoint."""
    if not work.is_training:
        return resident.prices.forward(work.num_tokens)
    cost = resident.prices.forward_backward(work.num_tokens)
    if opens_step:
        cost += resident.prices.optim_step()
        cost += resident.prices.save() if resident.program.step_ends_in_checkpoint() else 0
    return cost


def offers(resident: Resident) -> tuple[Microbatch, ...]:
    """The microbatches that a run gives to the next gang: those left of its step or evaluation."""
    if resident.is_closing:
        return ()
    first = resident.program.at_boundary
    return tuple(
        Microbatch(tokens=work.num_tokens, cost=cost_of(resident, work, opens_step=first and index == 0))
        for index, work in enumerate(resident.program.offered())
    )


def take_snapshot(
    books: Books,
    residents: Collection[Resident],
    settings: Settings,
    *,
    base_hash: str,
    floor: float,
    draining: bool,
) -> Snapshot:
    """One read of the database."""
    with books.read() as session:
        waiting = {row.tenant_id: row for row in runs.next_waiting(session, base_hash)}
        ids = waiting.keys() | {resident.job.tenant_id for resident in residents}
        tenants = runs.tenants_of(session, ids)
        counters = runs.counters(session, [resident.run_id for resident in residents])
    by_tenant: Mapping[str, list[ResidentRun]] = {tenant_id: [] for tenant_id in tenants}
    for resident in residents:
        if resident.run_id in counters:
            by_tenant[resident.job.tenant_id].append(
                ResidentRun(
                    run_id=resident.run_id,
                    weight=resident.job.weight,
                    counter=counters[resident.run_id],
                    order=resident.job.number,
                    microbatches=offers(resident),
                )
            )
    heads = [head for resident_runs in by_tenant.values() for run in resident_runs for head in run.microbatches]
    return Snapshot(
        tenants=tuple(
            Tenant(
                tenant_id=tenant.id,
                share=tenant.share,
                counter=tenant.counter,
                backlogged=tenant.backlogged,
                resident=tuple(by_tenant[tenant.id]),
                waiting=_waiting(waiting.get(tenant.id)),
            )
            for tenant in tenants.values()
        ),
        token_budget=max(settings.token_budget, *(head.tokens for head in heads), 1),
        max_microbatch_cost=max(settings.microbatch_tokens, *(head.cost for head in heads), 1),
        fill_min=FILL_MIN_TOKENS,
        max_resident_runs=settings.max_resident_runs,
        floor=floor,
        draining=draining,
    )


def _waiting(row: runs.Waiting | None) -> WaitingRun | None:
    return None if row is None else WaitingRun(run_id=row.run_id, counter=row.counter, order=row.order)
