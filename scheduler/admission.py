"""Which waiting run becomes resident, and which gives way: by places, and by bytes where they are known."""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any

from scheduler.snapshot import Footprint, ResidentRun, Snapshot, Tenant, WaitingRun


class Wait(StrEnum):
    """Why a tenant's next run is not resident."""

    FAIR_SHARE = "fair_share"  # others hold the places
    MEMORY = "memory"  # there are places, but not enough bytes
    TOO_LARGE = "too_large"  # it would not fit into an empty machine
    DRAINING = "draining"


class Occupancy:
    """Places and bytes, as runs come and go. Each token of a pass is reckoned as the dearest."""

    def __init__(self, snapshot: Snapshot, footprints: Iterable[Footprint] = ()):
        self._snapshot = snapshot
        self._footprints = list(footprints)

    def add(self, run: ResidentRun | WaitingRun) -> None:
        """It takes its place."""
        self._footprints.append(run.footprint)

    def remove(self, run: ResidentRun | WaitingRun) -> None:
        """It leaves it."""
        self._footprints.remove(run.footprint)

    def has_place(self) -> bool:
        """Whether one more run may be resident, whatever it takes."""
        return len(self._footprints) < self._snapshot.max_resident_runs

    def has_bytes(self, run: WaitingRun) -> bool:
        """Whether it fits beside the others, with the pass that must be possible."""
        if self._snapshot.memory is None:
            return True
        all_ = [*self._footprints, run.footprint]
        a_pass = least_pass(self._snapshot, is_alone=len(all_) == 1) * max(footprint.per_token for footprint in all_)
        return a_pass <= _left(self._snapshot.memory, all_)

    def fits(self, run: WaitingRun) -> bool:
        """Whether it may become resident now."""
        return self.has_place() and self.has_bytes(run)


def least_pass(snapshot: Snapshot, *, is_alone: bool) -> int:
    """Tokens of the pass that must be possible."""
    least = snapshot.least_budget or snapshot.token_budget
    return snapshot.least_alone or least if is_alone else least


def fitting_budget(memory: int, footprints: Iterable[Footprint], *, least: int, most: int) -> int:
    """As many tokens as fit into a pass beside these runs: B where it is not fixed."""
    runs = list(footprints)
    dearest = max((footprint.per_token for footprint in runs), default=0)
    return most if not dearest else min(most, max(least, _left(memory, runs) // dearest))


def admissions(snapshot: Snapshot) -> list[WaitingRun]:
    """The runs that become resident now, at most one a tenant.

    Tenants without a resident run come first, then in order of V, then of submission. Where one of those does not
    fit, what is free is kept for it; a further run of a tenant that has one is passed over.
    """
    if snapshot.draining:
        return []
    occupancy, empty = Occupancy(snapshot, _footprints(snapshot)), Occupancy(snapshot)
    admitted = []
    for tenant in sorted(snapshot.tenants, key=_turn):
        run = tenant.waiting
        if run is None or not empty.has_bytes(run):
            continue
        if occupancy.fits(run):
            occupancy.add(run)
            admitted.append(run)
        elif not tenant.resident:
            break
    return admitted


def waits(snapshot: Snapshot, admitted: list[WaitingRun]) -> dict[str, Wait]:
    """Why each tenant's next run stays out, by run."""
    occupancy = Occupancy(snapshot, [*_footprints(snapshot), *(run.footprint for run in admitted)])
    empty = Occupancy(snapshot)
    reasons = {}
    for run in (tenant.waiting for tenant in snapshot.tenants):
        if run is None or run in admitted:
            continue
        if not empty.has_bytes(run):
            reasons[run.run_id] = Wait.TOO_LARGE
        elif snapshot.draining:
            reasons[run.run_id] = Wait.DRAINING
        else:
            is_short_of_bytes = occupancy.has_place() and not occupancy.has_bytes(run)
            reasons[run.run_id] = Wait.MEMORY if is_short_of_bytes else Wait.FAIR_SHARE
    return reasons


def joins(snapshot: Snapshot, admitted: list[WaitingRun]) -> dict[str, float]:
    """The counter that an admitted run begins at: the smallest of its tenant's resident runs, if there are any.

    It may come from another daemon, where it got far ahead of them or fell behind, or have lost work in a crash as they
    have.
    """
    counters = {}
    for tenant in snapshot.tenants:
        if tenant.waiting in admitted and tenant.waiting is not None and tenant.resident:
            least = min(run.counter for run in tenant.resident)
            counters[tenant.waiting.run_id] = least
    return counters


def evictions(snapshot: Snapshot, admitted: list[WaitingRun]) -> list[ResidentRun]:
    """The runs that give way so that each tenant with work has a resident run, or its turn at one.

    First go further runs of tenants that hold several, then the last run of who has had most since it came.
    Nobody goes before its stay is over. What is leaving already counts as gone: asking again wishes for no more.
    """
    if snapshot.draining:
        return []
    staying = {one.tenant_id: [run for run in one.resident if not run.leaving] for one in snapshot.tenants}
    kept = [run.footprint for runs in staying.values() for run in runs]
    occupancy = Occupancy(snapshot, [*kept, *(run.footprint for run in admitted)])
    empty = Occupancy(snapshot)
    evicted: list[ResidentRun] = []
    in_turn = [(one, one.waiting) for one in sorted(snapshot.tenants, key=_turn) if one.waiting and not one.resident]
    wanting = [(one, run) for one, run in in_turn if run not in admitted and empty.has_bytes(run)]
    least = min((one.share for one, _ in wanting), default=0.0)
    for _, run in wanting:
        while not occupancy.fits(run):
            victim = _next_to_go(snapshot, staying, least)
            if victim is None:
                return evicted
            evicted.append(victim)
            occupancy.remove(victim)
        occupancy.add(run)
    return evicted


def _next_to_go(snapshot: Snapshot, staying: dict[str, list[ResidentRun]], least: float) -> ResidentRun | None:
    """Taken out of `staying`; None when nobody has been served for long enough.

    Q is for the smallest share of those who wait for a place, `least`; before its last run goes, who has a larger one
    gets as much more, so that tenants who take turns at a place get service by their shares.
    """
    held = [(one, run) for one in snapshot.tenants for run in staying[one.tenant_id]]
    further = [
        ((len(staying[one.tenant_id]), one.counter, one.tenant_id, -run.weight, run.order), run)
        for one, run in held
        if len(staying[one.tenant_id]) > 1 and run.served >= snapshot.min_stay
    ]
    last = [
        ((run.served / one.share, one.counter, one.tenant_id), run)
        for one, run in held
        if len(staying[one.tenant_id]) == 1 and run.served * min(least, one.share) >= snapshot.min_stay * one.share
    ]
    candidates: list[tuple[tuple[Any, ...], ResidentRun]] = [*further] or [*last]
    if not candidates:
        return None
    _, victim = max(candidates, key=lambda candidate: candidate[0])
    next(runs for runs in staying.values() if victim in runs).remove(victim)
    return victim


def _left(memory: int, footprints: Sequence[Footprint]) -> int:
    """For a pass beside these runs, one of which is being saved."""
    copy = max((footprint.copy for footprint in footprints), default=0)
    return memory - sum(footprint.resident for footprint in footprints) - copy


def _footprints(snapshot: Snapshot) -> list[Footprint]:
    return [run.footprint for tenant in snapshot.tenants for run in tenant.resident]


def _turn(tenant: Tenant) -> tuple[bool, float, int, str]:
    """Who is next for a place: the smallest V as it stands, and it does not rise while it waits."""
    order = tenant.waiting.order if tenant.waiting else 0
    return bool(tenant.resident), tenant.counter, order, tenant.tenant_id
