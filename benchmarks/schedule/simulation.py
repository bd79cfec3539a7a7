"""A daemon and its database in miniature, gang by gang: what the scheduler decides is carried out at once."""

from bisect import insort
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from benchmarks.schedule.measures import ShareError, TimeShares
from benchmarks.schedule.policies import Policy
from benchmarks.schedule.timing import PASS_TOKENS
from benchmarks.schedule.workload import Job, Workload
from scheduler.plan import Plan
from scheduler.snapshot import Microbatch, ResidentRun, Snapshot, Tenant, WaitingRun


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The server's settings, at their defaults."""

    token_budget: int = 4096
    fill_min: int = 320
    max_resident_runs: int = 16
    stay_tokens: int = 16_384


@dataclass(frozen=True)
class Outcome:
    """What a policy came to. Arrays have a number for each job, in order of arrival; time is in token-equivalents."""

    num_gangs: int
    waits: NDArray[np.float64]  # from arrival to the first gang; NaN: cancelled before
    stays: NDArray[np.float64]  # from arrival to the end; NaN: cancelled
    share_errors: NDArray[np.float64]  # for each pair and interval, ÷ the bound
    fill: float  # of the budget, in gangs for which there was enough
    took: dict[str, float]  # time that a tenant's work took
    due: dict[str, float]  # its share of the time in which it had work


@dataclass
class _Run:
    job: Job
    number: int
    run_id: str
    counter: float = 0.0
    served: int = 0
    round: int = 0
    unit: int = 0
    done: int = 0  # microbatches of the unit
    leaving: bool = False
    began: float | None = None
    offers: tuple[Microbatch, ...] = field(init=False)  # what is left of the unit
    num_tokens: int = field(init=False)  # in those
    waiting: WaitingRun = field(init=False)  # as the scheduler sees it while it waits

    def __post_init__(self) -> None:
        self._offer()
        self.wait()

    def _offer(self) -> None:
        self.offers = self.job.units[self.unit].microbatches[self.done :]
        self.num_tokens = sum(one.tokens for one in self.offers)

    def wait(self) -> None:
        """Its counter stands still until it is resident again."""
        self.leaving = False
        self.waiting = WaitingRun(run_id=self.run_id, counter=self.counter, order=self.number)

    def advance(self, num_microbatches: int) -> float:
        """Train so many; the time that they take."""
        unit = self.job.units[self.unit]
        takes = sum(unit.takes[self.done : self.done + num_microbatches])
        self.done += num_microbatches
        if self.done == len(unit.microbatches):
            self.done = 0
            self.unit = (self.unit + 1) % len(self.job.units)
            self.round += not self.unit
        self._offer()
        return takes

    @property
    def is_finished(self) -> bool:
        return self.round == self.job.num_rounds


@dataclass
class _Account:
    name: str
    share: float
    counter: float = 0.0
    backlogged: bool = False
    resident: dict[str, _Run] = field(default_factory=dict)
    waiting: deque[_Run] = field(default_factory=deque)
    queued: Tenant | None = None  # as the scheduler sees it while it has no resident run; None: not made yet


class Simulation:
    """One workload under one policy."""

    def __init__(self, workload: Workload, policy: Policy, sizes: Sizes = Sizes()):
        self._jobs = workload.jobs
        self._policy = policy
        self._sizes = sizes
        self._accounts = {name: _Account(name, share) for name, share in workload.shares.items()}
        self._with_runs: dict[str, _Account] = {}  # accounts with a resident run
        self._queue: list[tuple[float, int, str]] = []  # the others with a waiting one, who is next first
        self._resident: dict[str, tuple[_Account, _Run]] = {}
        self._backlogged: frozenset[str] = frozenset()  # as last planned
        self._floor, self._now, self._num_arrived, self._num_gangs = 0.0, 0.0, 0, 0
        self._max_cost = max(one.cost for job in workload.jobs for unit in job.units for one in unit.microbatches)
        self._share_error = ShareError(workload.shares, self._max_cost, sizes.max_resident_runs)
        self._times = TimeShares(workload.shares)
        self._waits, self._stays = (np.full(len(self._jobs), np.nan) for _ in range(2))
        self._impatient: list[tuple[float, int]] = []  # when a job will be cancelled, and its number
        self._filled: list[int] = []  # tokens of the gangs for which there was enough

    def run(self, until: float = float("inf")) -> Outcome:
        """Until every job has ended, or the time is up."""
        self._between_gangs()
        while self._now < until and (self._with_runs or self._queue or self._num_arrived < len(self._jobs)):
            if not self._with_runs and not self._queue:
                self._now = self._jobs[self._num_arrived].arrival
                self._between_gangs()
            self._gang()
            self._between_gangs()
        for tenant in {*self._with_runs, *(name for _, _, name in self._queue)}:
            self._times.end(tenant)
        return Outcome(
            self._num_gangs,
            self._waits,
            self._stays,
            self._share_error.ended(),
            sum(self._filled) / (len(self._filled) * self._sizes.token_budget) if self._filled else 1.0,
            self._times.took,
            self._times.due,
        )

    def _between_gangs(self) -> None:
        """Jobs come, and some are cancelled."""
        self._arrive()
        while self._impatient and self._impatient[0][0] <= self._now:
            self._cancel(heappop(self._impatient)[1])

    def _arrive(self) -> None:
        while self._num_arrived < len(self._jobs) and self._jobs[self._num_arrived].arrival <= self._now:
            job = self._jobs[self._num_arrived]
            account = self._accounts[job.tenant]
            self._times.begin(job.tenant)
            account.waiting.append(_Run(job, self._num_arrived, str(self._num_arrived)))
            if not account.resident and len(account.waiting) == 1:
                self._enqueue(account)
            if job.patience < float("inf"):
                heappush(self._impatient, (job.arrival + job.patience, self._num_arrived))
            self._num_arrived += 1

    def _cancel(self, number: int) -> None:
        """Nothing happens to a job that has ended."""
        account = self._accounts[self._jobs[number].tenant]
        if str(number) in account.resident:
            self._remove(account, account.resident[str(number)])
            self._settle(account)
            return
        run = next((run for run in account.waiting if run.number == number), None)
        if run is not None:
            if not account.resident:
                self._queue.remove(self._turn(account))
            account.waiting.remove(run)
            self._settle(account)

    def _enqueue(self, account: _Account) -> None:
        account.queued = None
        insort(self._queue, self._turn(account))

    def _turn(self, account: _Account) -> tuple[float, int, str]:
        order = account.waiting[0].number
        return (0.0 if self._policy.by_submission else account.counter), order, account.name

    def _gang(self) -> None:
        while (decision := self._policy.plan(self._snapshot())).admit:
            self._admit(decision)
        self._floor = decision.floor
        for name in self._backlogged ^ decision.backlogged:
            account = self._accounts[name]
            account.backlogged, account.queued = name in decision.backlogged, None
        self._backlogged = decision.backlogged
        for name, rise in decision.rises.items():
            self._accounts[name].counter += rise
        for run_id, rise in decision.run_rises.items():
            self._resident[run_id][1].counter += rise
        for run_id in decision.evict:
            self._resident[run_id][1].leaving = True
        self._train(decision)
        self._num_gangs += 1

    def _snapshot(self) -> Snapshot:
        sizes = self._sizes
        others = [self._accounts[name] for _, _, name in self._queue[: sizes.max_resident_runs]]
        return Snapshot(
            tenants=(*map(_tenant, self._with_runs.values()), *map(_queued, others)),
            token_budget=sizes.token_budget,
            max_microbatch_cost=self._max_cost,
            fill_min=sizes.fill_min,
            max_resident_runs=sizes.max_resident_runs,
            min_stay=sizes.stay_tokens,
            floor=self._floor,
            draining=False,
        )

    def _admit(self, decision: Plan) -> None:
        for run_id in decision.admit:
            account = self._accounts[self._jobs[int(run_id)].tenant]
            if not account.resident:
                self._queue.remove(self._turn(account))
                self._with_runs[account.name] = account
            run = account.waiting.popleft()
            assert run.run_id == run_id, "a tenant's jobs come in their order"
            run.counter = decision.joins.get(run_id, run.counter)
            run.served = 0
            account.resident[run_id] = run
            self._resident[run_id] = account, run

    def _train(self, decision: Plan) -> None:
        """Measure the gang, then let its runs advance."""
        taken = {slot.run_id: slot.num_microbatches for slot in decision.gang}
        costs = {run_id: self._cost(run_id, count) for run_id, count in taken.items()}
        self._measure(decision, taken, costs)
        began, takes = self._now, defaultdict[str, float](float)
        for account, run in (self._resident[run_id] for run_id in taken):
            run.served += costs[run.run_id]
            takes[account.name] += run.advance(taken[run.run_id])
            if run.began is None:
                run.began = began
                self._waits[run.number] = began - run.job.arrival
        duration = sum(takes.values()) + PASS_TOKENS
        self._times.add(takes, duration)
        self._now += duration
        self._let_go()

    def _cost(self, run_id: str, num_microbatches: int) -> int:
        _, run = self._resident[run_id]
        return sum(one.cost for one in run.offers[:num_microbatches])

    def _measure(self, decision: Plan, taken: Mapping[str, int], costs: Mapping[str, int]) -> None:
        """How full it is, and what it does to shares. Who has no head left and is next has run out."""
        num_offered = num_tokens = 0
        served = dict.fromkeys(decision.backlogged, 0)
        with_head = set()
        for name in decision.backlogged:
            for run_id, run in self._accounts[name].resident.items():
                count = taken.get(run_id, 0)
                num_offered += run.num_tokens
                if count:
                    served[name] += costs[run_id]
                    num_tokens += sum(one.tokens for one in run.offers[:count])
                if count < len(run.offers):
                    with_head.add(name)
        smallest = min((self._accounts[name].counter for name in with_head), default=float("inf"))
        ran_out = [name for name in decision.backlogged - with_head if self._accounts[name].counter <= smallest]
        self._share_error.add(served, decision.backlogged, ran_out)
        if num_offered >= self._sizes.token_budget:
            self._filled.append(num_tokens)

    def _let_go(self) -> None:
        """Runs that are finished, or give way and stand between two units."""
        for account in list(self._with_runs.values()):
            for run in list(account.resident.values()):
                if run.is_finished:
                    self._stays[run.number] = self._now - run.job.arrival
                elif run.leaving and not run.done:
                    run.wait()
                    insort(account.waiting, run, key=_number)
                else:
                    continue
                self._remove(account, run)
            self._settle(account)

    def _remove(self, account: _Account, run: _Run) -> None:
        del account.resident[run.run_id], self._resident[run.run_id]

    def _settle(self, account: _Account) -> None:
        """Once some of its runs have gone: without a resident one it queues, or has no work."""
        if account.resident:
            return
        self._with_runs.pop(account.name, None)
        if account.waiting:
            self._enqueue(account)
        else:
            self._times.end(account.name)


def _number(run: _Run) -> int:
    return run.number


def _tenant(account: _Account) -> Tenant:
    return Tenant(
        tenant_id=account.name,
        share=account.share,
        counter=account.counter,
        backlogged=account.backlogged,
        resident=tuple(
            ResidentRun(
                run_id=run_id,
                weight=1,
                counter=run.counter,
                order=run.number,
                microbatches=run.offers,
                served=run.served,
                leaving=run.leaving,
            )
            for run_id, run in account.resident.items()
        ),
        waiting=account.waiting[0].waiting if account.waiting else None,
    )


def _queued(account: _Account) -> Tenant:
    """Nothing changes while it waits for its turn."""
    account.queued = account.queued or _tenant(account)
    return account.queued
