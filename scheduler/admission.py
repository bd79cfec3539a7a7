"""Which waiting run becomes resident, and which resident run gives way. Places are counted, not bytes."""

from collections.abc import Mapping

from scheduler.snapshot import ResidentRun, Snapshot, WaitingRun


def admissions(snapshot: Snapshot, counters: Mapping[str, float]) -> list[WaitingRun]:
    """The runs that take the free places, at most one a tenant.

    Tenants without a resident run come first, then in order of V (`counters`, by tenant), then of submission.
    """
    num_free = snapshot.max_resident_runs - sum(len(tenant.resident) for tenant in snapshot.tenants)
    if snapshot.draining or num_free <= 0:
        return []
    candidates = [
        (bool(tenant.resident), counters[tenant.tenant_id], tenant.waiting.order, tenant.waiting)
        for tenant in snapshot.tenants
        if tenant.waiting is not None
    ]
    return [run for *_, run in sorted(candidates, key=lambda candidate: candidate[:3])[:num_free]]


def evictions(
    snapshot: Snapshot, counters: Mapping[str, float], admitted: list[WaitingRun]
) -> list[ResidentRun]:
    """The runs that give way so that each tenant with work has one resident run.

    The tenant that holds the most places gives one up, never its last; among equals the one of the largest
    V. It gives up its run of lowest priority that was submitted last. Asked again, the same answer: a run
    that has not yet left still holds its place.
    """
    if snapshot.draining:
        return []
    num_wanted = sum(
        tenant.waiting is not None and not tenant.resident and tenant.waiting not in admitted
        for tenant in snapshot.tenants
    )
    holdings = {
        tenant.tenant_id: sorted(tenant.resident, key=lambda run: (run.weight, -run.order), reverse=True)
        for tenant in snapshot.tenants
        if tenant.resident
    }
    evicted: list[ResidentRun] = []
    while len(evicted) < num_wanted and holdings:
        holder = max(
            holdings, key=lambda tenant_id: (len(holdings[tenant_id]), counters[tenant_id], tenant_id)
        )
        if len(holdings[holder]) == 1:
            break
        evicted.append(holdings[holder].pop())
    return evicted
