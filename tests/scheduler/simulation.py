"""A daemon in miniature: it keeps the books, carries out plans and trains nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from scheduler.plan import Plan, plan
from scheduler.snapshot import Microbatch, ResidentRun, Snapshot, Tenant, WaitingRun


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
    counter: float = 0.0
    done: int = 0  # microbatches of the first step
    served: int = 0  # cost, charged or not

    @property
    def at_boundary(self) -> bool:
        return self.done == 0


@dataclass
class Client:
    """A tenant: its books and its runs."""

    share: float
    counter: float = 0.0
    backlogged: bool = False
    resident: dict[str, Run] = field(default_factory=dict)
    waiting: dict[str, Run] = field(default_factory=dict)
    served: int = 0

    def next_waiting(self) -> Run | None:
        return min(self.waiting.values(), key=lambda run: (-run.weight, run.order), default=None)


@dataclass(kw_only=True)
class World:
    """All tenants, and the daemon's loop: snapshot, plan, train, record."""

    token_budget: int = 4096
    max_microbatch_cost: int = 1024
    fill_min: int = 0
    max_resident_runs: int = 16
    floor: float = 0.0
    draining: bool = False
    clients: dict[str, Client] = field(default_factory=dict)
    num_submitted: int = 0
    history: list[tuple[Snapshot, Plan]] = field(default_factory=list)

    def submit(self, tenant_id: str, run_id: str, steps: Sequence[Sequence[Microbatch]], weight: int = 1) -> None:
        self.num_submitted += 1
        run = Run(run_id, weight, self.num_submitted, [list(step) for step in steps])
        self.clients[tenant_id].waiting[run_id] = run

    def cancel(self, tenant_id: str) -> None:
        self.clients[tenant_id].resident.clear()
        self.clients[tenant_id].waiting.clear()

    def crash(self) -> None:
        """The daemon dies: no run is resident, steps that were under way begin anew, the books stay."""
        for client in self.clients.values():
            for run in client.resident.values():
                run.done = 0
            client.waiting |= client.resident
            client.resident.clear()

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
            )
            for tenant_id, client in self.clients.items()
            if client.resident or client.waiting
        )
        return Snapshot(
            tenants=tenants,
            token_budget=self.token_budget,
            max_microbatch_cost=self.max_microbatch_cost,
            fill_min=self.fill_min,
            max_resident_runs=self.max_resident_runs,
            floor=self.floor,
            draining=self.draining,
        )

    def gang(self) -> Plan:
        """One turn of the loop: give the places that are free, then train; the plan that was carried out."""
        while (decision := self._plan()).admit:
            for client in self.clients.values():
                for run_id in [run_id for run_id in decision.admit if run_id in client.waiting]:
                    client.resident[run_id] = client.waiting.pop(run_id)
                    client.resident[run_id].counter += decision.run_lifts.get(run_id, 0.0)
        self.floor = decision.floor
        for tenant_id, client in self.clients.items():
            client.backlogged = tenant_id in decision.backlogged
            client.counter += decision.lifts.get(tenant_id, 0.0) + decision.charges.get(tenant_id, 0.0)
            for run in client.resident.values():
                run.counter += decision.run_charges.get(run.run_id, 0.0)
        for slot in decision.gang:
            self._train(slot.run_id, slot.num_microbatches)
        for client in self.clients.values():
            for run_id in [run_id for run_id in decision.evict if run_id in client.resident]:
                if client.resident[run_id].at_boundary:
                    client.waiting[run_id] = client.resident.pop(run_id)
        return decision

    def _plan(self) -> Plan:
        snapshot = self.snapshot()
        decision = plan(snapshot)
        self.history.append((snapshot, decision))
        return decision

    def gangs(self, count: int) -> list[Plan]:
        return [self.gang() for _ in range(count)]

    def served(self, tenant_id: str) -> int:
        return self.clients[tenant_id].served

    def _offer(self, run: Run) -> ResidentRun:
        """What is left of its step, up to more than a gang can hold."""
        offered: list[Microbatch] = []
        tokens = 0
        for microbatch in run.steps[0][run.done :]:
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
        )

    def _train(self, run_id: str, num_microbatches: int) -> None:
        client = next(client for client in self.clients.values() if run_id in client.resident)
        run = client.resident[run_id]
        cost = sum(microbatch.cost for microbatch in run.steps[0][run.done : run.done + num_microbatches])
        client.served += cost
        run.served += cost
        run.done += num_microbatches
        if run.done == len(run.steps[0]):
            run.steps.pop(0)
            run.done = 0
        if not run.steps:
            del client.resident[run_id]


def _waiting(run: Run) -> WaitingRun:
    return WaitingRun(run_id=run.run_id, counter=run.counter, order=run.order)
