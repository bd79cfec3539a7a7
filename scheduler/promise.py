"""What may happen before a resident run rides: the bound that the rule of `fairness` keeps, as a number of gangs."""

from collections.abc import Iterable

from scheduler.fairness import lifts
from scheduler.snapshot import ResidentRun, Snapshot, Tenant


def longest_waits(snapshot: Snapshot) -> dict[str, int]:
    """For each resident run that offers something the gang, counted from the next, in which it rides at the latest.

    If nobody comes. While it waits another is charged only as long as it stays within L/w of it, and each gang that it
    does not ride in charges the others for `fill_min` tokens, or is full to less than L.
    """
    lifted = lifts(snapshot.tenants, snapshot.floor)
    levels = [(one, one.counter + lifted.get(one.tenant_id, 0.0)) for one in snapshot.tenants if one.offers]
    bound = snapshot.max_microbatch_cost
    least = max(1, min(snapshot.fill_min, snapshot.token_budget - bound + 1))
    return {
        run.run_id: 1 + int(_before_it(bound, tenant, run, level, levels) // least)
        for tenant, level in levels
        for run in tenant.resident
        if run.microbatches
    }


def _before_it(
    bound: int, tenant: Tenant, run: ResidentRun, level: float, levels: Iterable[tuple[Tenant, float]]
) -> float:
    """The most that others are charged before a run rides: its siblings first, which moves its tenant's V."""
    siblings = (one for one in tenant.resident if one.microbatches and one is not run)
    own = sum(max(0.0, bound + one.weight * (run.counter - one.counter)) for one in siblings)
    level += own / tenant.share
    return own + sum(
        [past for one, at in levels if one is not tenant and (past := bound + one.share * (level - at)) > 0]
    )
