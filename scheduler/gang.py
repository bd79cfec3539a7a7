"""Filling one gang: which heads ride together in the next pass."""

from collections.abc import Sequence

from scheduler.fairness import Rule, TenantQueue, pick, take_along


def fill(tenants: Sequence[TenantQueue], *, token_budget: int, max_cost: int, fill_min: int) -> None:
    """Take heads until none may follow; each is charged when it is selected.

    When who has run out (and is owed) keeps every head back, the gang closes early, but not below `fill_min`
    tokens: to reach it the others go on among themselves, and take along who is owed.
    """
    room = _take_all(tenants, Rule(room=token_budget, max_cost=max_cost), least_room=0)
    fewest = Rule(room=room, max_cost=max_cost, waits_for_owed=False)
    _take_all(tenants, fewest, least_room=token_budget - fill_min)


def _take_all(tenants: Sequence[TenantQueue], rule: Rule, *, least_room: int) -> int:
    """Take heads by the rule while more than `least_room` is left; the room left then."""
    owners = {run.run.run_id: tenant for tenant in tenants for run in tenant.runs}
    room = rule.room
    while room > least_room:
        run = pick(tenants, Rule(room=room, max_cost=rule.max_cost, waits_for_owed=rule.waits_for_owed))
        if run is None:
            break
        tenant, head = owners[run.run.run_id], run.head
        room -= head.tokens
        run.num_taken += 1
        run.cost += head.cost
        run.counter += head.cost / run.weight
        tenant.counter += head.cost / tenant.weight
        if not rule.waits_for_owed:
            take_along(tenant.runs, run, head.cost, rule.max_cost)
            take_along(tenants, tenant, head.cost, rule.max_cost)
    return room
