"""Filling one gang: which heads ride together in the next pass."""

from collections.abc import Sequence
from dataclasses import replace

from scheduler.fairness import Rule, RunQueue, TenantQueue, pick


def fill(
    tenants: Sequence[TenantQueue], *, token_budget: int, max_cost: int, fill_min: int
) -> list[RunQueue]:
    """Take heads until none may follow; the runs that ride, in the order of their first microbatch.

    A head is charged when it is selected, to its run and to its tenant. When the bound alone forbids every
    head (who is owed has run out), the gang closes early, but not below `fill_min` tokens: heads taken only
    to reach it ride free, in order of V.
    """
    tenant_of = {run.run.run_id: tenant for tenant in tenants for run in tenant.runs}
    riding: dict[str, RunQueue] = {}
    num_tokens = 0
    while True:
        rule = Rule(room=token_budget - num_tokens, max_cost=max_cost)
        run = pick(tenants, rule)
        free = (
            run is None and num_tokens < fill_min and pick(tenants, replace(rule, room=token_budget)) is None
        )
        if free:
            run = pick(tenants, replace(rule, bounded=False))
        if run is None:
            return list(riding.values())
        head = run.head
        num_tokens += head.tokens
        run.num_taken += 1
        riding[run.run.run_id] = run
        if not free:
            tenant = tenant_of[run.run.run_id]
            run.charged += head.cost
            run.counter += head.cost / run.weight
            tenant.counter += head.cost / tenant.weight
