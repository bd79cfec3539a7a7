"""A daemon in miniature: it keeps the books, carries out plans and trains nothing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from scheduler.plan import Plan, plan
from scheduler.snapshot import Footprint, Microbatch, ResidentRun, Snapshot, Tenant, WaitingRun


def microbatches(*sizes: int) -> list[Microbatch]:
    """Microbatches that cost what they hold."""
    return [Microbatch(tokens=size, cost=size) for size in sizes]


@dataclass
class Run:
    """A run in training: its optimizer steps, and how far it is."""

    run_id: str
    weight: int
    order: int
    steps: list[list[Microbatch]]
    footprint: Footprint
    counter: float = 0.0
    step: int = 0  # steps taken
    done: int = 0  # microbatches of the step under way
    charged: int = 0  # cost
    stay: int = 0  # of that, since it became resident
    leaving: bool = False
    saved_step: int = 0  # the recovery point
    saved_cost: int = 0
    lost: int = 0  # charged since the recovery point when its lease ended; the next claim gives it back
    trained: list[Microbatch] = field(default_factory=list)  # in order, up to where it is

    @property
    def at_boundary(self) -> bool:
        return self.done == 0

    @property
    def is_finished(self) -> bool:
        return self.step == len(self.steps)

    def save(self) -> None:
        self.saved_step, self.saved_cost = self.step, self.charged

    def left(self) -> Iterator[Microbatch]:
        """Of the step under way, which may be long: who looks at its first few copies no more than those."""
        return iter(()) if self.is_finished else islice(self.steps[self.step], self.done, None)


@dataclass
class Client:
    """A tenant: its books and its runs."""

    share: float
    counter: float = 0.0
    backlogged: bool = False
    resident: dict[str, Run] = field(default_factory=dict)
    waiting: dict[str, Run] = field(default_factory=dict)
    served: int = 0  # cost of all that was trained for it, lost or not
    sampled: int = 0  # since the last plan

    def next_waiting(self) -> Run | None:
        return min(self.waiting.values(), key=lambda run: (-run.weight, run.order), default=None)


@dataclass(kw_only=True)
class World:
    """All tenants, and the daemon's loop: snapshot, plan, train, record."""

    token_budget: int = 4096
    max_microbatch_cost: int = 1024
    fill_min: int = 0
    max_resident_runs: int = 16
    memory: int | None = None
    min_stay: int = 0
    floor: float = 0.0
    draining: bool = False
    clients: dict[str, Client] = field(default_factory=dict)
    num_submitted: int = 0
    history: list[tuple[Snapshot, Plan]] = field(default_factory=list)

    def submit(
        self,
        tenant_id: str,
        run_id: str,
        steps: Sequence[Sequence[Microbatch]],
        weight: int = 1,
        footprint: Footprint = Footprint(),
    ) -> Run:
        self.num_submitted += 1
        run = Run(run_id, weight, self.num_submitted, [list(step) for step in steps], footprint)
        self.clients[tenant_id].waiting[run_id] = run
        return run

    def cancel(self, tenant_id: str) -> None:
        self.clients[tenant_id].resident.clear()
        self.clients[tenant_id].waiting.clear()

    def reweight(self, tenant_id: str, share: float) -> None:
        """The operator changes a share: what the tenant is ahead by, in cost, stays the same."""
        client = self.clients[tenant_id]
        if client.counter > self.floor:
            client.counter = self.floor + (client.counter - self.floor) * client.share / share
        client.share = share

    def crash(self) -> None:
        """The daemon dies: every run goes back to its recovery point."""
        for tenant_id, client in self.clients.items():
            for run_id in list(client.resident):
                self.lose(tenant_id, run_id)

    def lose(self, tenant_id: str, run_id: str) -> None:
        """A run's lease ends."""
        client = self.clients[tenant_id]
        run = client.waiting[run_id] = client.resident.pop(run_id)
        run.lost = run.charged - run.saved_cost
        del run.trained[len(run.trained) - run.done :]
        for step in run.steps[run.saved_step : run.step]:
            del run.trained[len(run.trained) - len(step) :]
        run.step, run.done, run.charged, run.leaving = run.saved_step, 0, run.saved_cost, False

    def claim(self, client: Client, run_id: str) -> None:
        """A run becomes resident, and what it lost is given back."""
        run = client.resident[run_id] = client.waiting.pop(run_id)
        run.stay = 0
        if run.lost:
            client.counter = (client.counter if client.backlogged else max(client.counter, self.floor)) - (
                run.lost / client.share
            )
            client.backlogged = True
            run.counter -= run.lost / run.weight
            run.lost = 0

    def resident(self) -> list[str]:
        return sorted(run_id for client in self.clients.values() for run_id in client.resident)

    def snapshot(self) -> Snapshot:
        tenants = tuple(
            Tenant(
                tenant_id=tenant_id,
                share=client.share,
                counter=client.counter,
                backlogged=client.backlogged,
                resident=tuple(self._offer(run) for run in client.resident.values()),
                waiting=None if (run := client.next_waiting()) is None else _waiting(run),
                sampled=client.sampled,
            )
            for tenant_id, client in self.clients.items()
            if client.resident or client.waiting or client.sampled
        )
        return Snapshot(
            tenants=tenants,
            token_budget=self.token_budget,
            max_microbatch_cost=self.max_microbatch_cost,
            fill_min=self.fill_min,
            max_resident_runs=self.max_resident_runs,
            memory=self.memory,
            min_stay=self.min_stay,
            floor=self.floor,
            draining=self.draining,
        )

    def gang(self) -> Plan:
        """One turn of the loop: give the places that are free, then train; the plan that was carried out."""
        while (decision := self._plan()).admit:
            for client in self.clients.values():
                for run_id in [run_id for run_id in decision.admit if run_id in client.waiting]:
                    self.claim(client, run_id)
                    run = client.resident[run_id]
                    run.counter = decision.joins.get(run_id, run.counter)
        self.floor = decision.floor
        for tenant_id, client in self.clients.items():
            client.backlogged = tenant_id in decision.backlogged
            client.counter += decision.rises.get(tenant_id, 0.0)
            client.sampled = 0
            for run in client.resident.values():
                run.counter += decision.run_rises.get(run.run_id, 0.0)
                run.leaving |= run.run_id in decision.evict
        for slot in decision.gang:
            self._train(slot.run_id, slot.num_microbatches)
        self._let_go()
        return decision

    def gangs(self, count: int) -> list[Plan]:
        return [self.gang() for _ in range(count)]

    def served(self, tenant_id: str) -> int:
        return self.clients[tenant_id].served

    def _plan(self) -> Plan:
        snapshot = self.snapshot()
        decision = plan(snapshot)
        self.history.append((snapshot, decision))
        return decision

    def _offer(self, run: Run) -> ResidentRun:
        """What is left of its step, up to more than a gang can hold."""
        offered: list[Microbatch] = []
        tokens = 0
        for microbatch in run.left():
            offered.append(microbatch)
            tokens += microbatch.tokens
            if tokens > self.token_budget:
                break
        return ResidentRun(
            run_id=run.run_id,
            weight=run.weight,
            counter=run.counter,
            order=run.order,
            microbatches=tuple(offered),
            served=run.stay,
            leaving=run.leaving,
            footprint=run.footprint,
        )

    def _train(self, run_id: str, num_microbatches: int) -> None:
        client = next(client for client in self.clients.values() if run_id in client.resident)
        run = client.resident[run_id]
        taken = list(islice(run.left(), num_microbatches))
        cost = sum(microbatch.cost for microbatch in taken)
        run.trained += taken
        client.served += cost
        run.charged += cost
        run.stay += cost
        run.done += num_microbatches
        if run.done == len(run.steps[run.step]):
            run.step += 1
            run.done = 0
        if run.is_finished:
            del client.resident[run_id]

    def _let_go(self) -> None:
        """Runs that give way are saved and leave, between two steps."""
        for client in self.clients.values():
            for run in [run for run in client.resident.values() if run.leaving and run.at_boundary]:
                run.save()
                run.leaving = False
                client.waiting[run.run_id] = client.resident.pop(run.run_id)


def _waiting(run: Run) -> WaitingRun:
    return WaitingRun(run_id=run.run_id, counter=run.counter, order=run.order, footprint=run.footprint)
