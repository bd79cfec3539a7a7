"""Filling one gang: which heads ride together in the next pass."""

from collections.abc import Sequence

from scheduler.fairness import Rule, TenantQueue, pick


def fill(tenants: Sequence[TenantQueue], *, token_budget: int, max_cost: int, fill_min: int) -> None:
    """Take heads until none may follow.

    A head is charged when it is selected. When the bound alone forbids every head (who is owed has run out),
    the gang closes early, but not below `fill_min` tokens: heads taken only to reach it ride free, in order
    of V.
    """
    room = token_budget
    while (run := pick(tenants, Rule(room=room, max_cost=max_cost))) is not None:
        room -= run.take(charge=True)
    room_is_short = pick(tenants, Rule(room=token_budget, max_cost=max_cost)) is not None
    while token_budget - room < fill_min and not room_is_short:
        run = pick(tenants, Rule(room=room, max_cost=max_cost, bounded=False))
        if run is None:
            return
        room -= run.take(charge=False)
