"""Which waiting run becomes resident, and which resident run gives way. Places are counted, not bytes."""

from scheduler.snapshot import ResidentRun, Snapshot, Tenant, WaitingRun


def admissions(snapshot: Snapshot) -> list[WaitingRun]:
    """The runs that take the free places, at most one a tenant.

    Tenants without a resident run come first, then in order of V, then of submission.
    """
    num_free = snapshot.max_resident_runs - sum(len(tenant.resident) for tenant in snapshot.tenants)
    if snapshot.draining or num_free <= 0:
        return []
    candidates = [
        (bool(tenant.resident), _counter(tenant, snapshot), tenant.waiting.order, tenant.waiting)
        for tenant in snapshot.tenants
        if tenant.waiting is not None
    ]
    return [run for *_, run in sorted(candidates, key=lambda candidate: candidate[:3])[:num_free]]


def run_lifts(snapshot: Snapshot, admitted: list[WaitingRun]) -> dict[str, float]:
    """By how much the counter of an admitted run rises: to the smallest of its tenant's resident runs."""
    rises = {}
    for tenant in snapshot.tenants:
        if tenant.waiting in admitted and tenant.waiting is not None and tenant.resident:
            rise = min(run.counter for run in tenant.resident) - tenant.waiting.counter
            if rise > 0:
                rises[tenant.waiting.run_id] = rise
    return rises


def evictions(snapshot: Snapshot, admitted: list[WaitingRun]) -> list[ResidentRun]:
    """The runs that give way so that each tenant with work has one resident run.

    The tenant that holds the most places gives one up, never its last; among equals the one of the largest
    V. It gives up its run of lowest priority that was submitted last. A run that has not yet left still
    holds its place, so asking again wishes for no more.
    """
    if snapshot.draining:
        return []
    num_wanted = sum(
        tenant.waiting is not None and not tenant.resident and tenant.waiting not in admitted
        for tenant in snapshot.tenants
    )
    holdings = [
        (tenant, sorted(tenant.resident, key=lambda run: (-run.weight, run.order)))
        for tenant in snapshot.tenants
        if tenant.resident
    ]
    evicted: list[ResidentRun] = []
    while holdings and len(evicted) < num_wanted:
        _, runs = max(holdings, key=lambda held: (len(held[1]), _counter(held[0], snapshot), held[0].tenant_id))
        if len(runs) == 1:
            break
        evicted.append(runs.pop())
    return evicted


def _counter(tenant: Tenant, snapshot: Snapshot) -> float:
    """Its V, or the V that it would be lifted to."""
    return max(tenant.counter, snapshot.floor)
