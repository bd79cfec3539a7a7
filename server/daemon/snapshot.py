"""What the scheduler may see: the resident runs, and of each tenant its share, counter and next waiting job."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from scheduler.admission import fitting_budget
from scheduler.snapshot import Footprint, Microbatch, ResidentRun, Snapshot, Tenant, WaitingRun
from server.daemon.books import Books
from server.daemon.program import Work
from server.daemon.room import Room
from server.daemon.roster import Resident
from server.db import accounts
from server.db.accounts import Account, Waiting
from server.db.daemons import Fenced
from server.settings import Settings

MOST_TOKENS = 4096
"""Of a gang where the budget is `auto`: larger passes are no faster."""


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
    fill_min: int,
    floor: float,
    draining: bool,
    sampled: Mapping[str, int],
    room: Room | None = None,
    passed_over: Collection[int] = (),
) -> Snapshot:
    """One read of the database: the tenants with a run in memory or samples to pay, and those who may be next.

    No plan lets more runs in, or asks more to give way, than there are places; so no more tenants need to be seen.
    `passed_over`: numbers of jobs that are too large for this machine, and hold up no others of their tenants.

    Raises `Fenced`: a run in memory waits, so that its lease is lost.
    """
    named = {resident.job.tenant_id for resident in residents} | sampled.keys()
    with books.glance() as connection:
        accounts_, counters = accounts.read_accounts(
            connection,
            base_hash,
            books.seat,
            named=named,
            num_others=settings.max_resident_runs,
            run_ids=[resident.run_id for resident in residents],
            passed_over=passed_over,
        )
    footprints = {resident.run_id: _footprint(room, resident.adapter) for resident in residents}
    _check_leases(accounts_, footprints)
    by_tenant: dict[str, list[ResidentRun]] = defaultdict(list)
    for resident in residents:
        if (counter := counters.get(resident.run_id)) is not None:
            run = _resident_run(resident, counter, footprints[resident.run_id])
            by_tenant[resident.job.tenant_id].append(run)
    heads = [head for resident_runs in by_tenant.values() for run in resident_runs for head in run.microbatches]
    least, most = _budget(settings, fill_min, max((head.tokens for head in heads), default=1))
    if room is not None:
        most = fitting_budget(room.memory, list(footprints.values()), least=least, most=most)
    return Snapshot(
        tenants=tuple(_tenant(one, by_tenant[one.tenant_id], sampled.get(one.tenant_id, 0), room) for one in accounts_),
        token_budget=most,
        least_budget=least,
        least_alone=_budget(settings, fill_min, 1)[0],
        memory=None if room is None else room.memory,
        max_microbatch_cost=max(settings.microbatch_tokens, *(head.cost for head in heads), 1),
        fill_min=fill_min,
        max_resident_runs=settings.max_resident_runs,
        min_stay=settings.stay_tokens,
        floor=floor,
        draining=draining,
    )


def _check_leases(accounts_: Sequence[Account], resident: Collection[str]) -> None:
    """Who was stopped since it looked at its own life may have been overtaken meanwhile."""
    for one in accounts_:
        if one.next is not None and one.next.run_id in resident:
            raise Fenced(f"the lease of run {one.next.run_id} is lost")


def most_tokens(settings: Settings) -> int:
    """Of a gang, wherever memory allows."""
    return MOST_TOKENS if settings.token_budget == "auto" else settings.token_budget


def _budget(settings: Settings, fill_min: int, largest_head: int) -> tuple[int, int]:
    """(the tokens that must fit into memory beside who comes, the most of a gang). A fixed budget may be smaller."""
    most = max(most_tokens(settings), largest_head)
    if settings.token_budget != "auto":
        return max(most, settings.microbatch_tokens), most
    least = max(settings.microbatch_tokens, fill_min, largest_head)
    return least, max(least, most)


def _footprint(room: Room | None, adapter: str) -> Footprint:
    return Footprint() if room is None else room.footprint(adapter)


def _tenant(account: Account, resident: Sequence[ResidentRun], sampled: int, room: Room | None) -> Tenant:
    return Tenant(
        tenant_id=account.tenant_id,
        share=account.share,
        counter=account.counter,
        backlogged=account.backlogged,
        resident=tuple(resident),
        waiting=None if account.next is None else _waiting_run(account.next, room),
        sampled=sampled,
    )


def _waiting_run(run: Waiting, room: Room | None) -> WaitingRun:
    return WaitingRun(run_id=run.run_id, counter=run.counter, order=run.order, footprint=_footprint(room, run.adapter))


def _resident_run(resident: Resident, counter: float, footprint: Footprint) -> ResidentRun:
    return ResidentRun(
        run_id=resident.run_id,
        weight=resident.job.weight,
        counter=counter,
        order=resident.job.number,
        microbatches=offers(resident),
        served=resident.served,
        leaving=resident.is_closing or resident.is_evicted,
        footprint=footprint,
    )
