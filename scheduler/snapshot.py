"""What a plan is made from: the tenants that want the machine, as they stand between two gangs.

Its size does not grow with the queue: a tenant shows its resident runs and its next waiting one.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """The smallest piece of work: one run's rows for one pass."""

    tokens: int  # counts against the gang's budget
    cost: int  # token-equivalents that its tenant pays


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a run takes of the memory, in bytes. The default is for who counts places alone."""

    resident: int = 0  # adapter, gradient and moments, as long as it is resident
    copy: int = 0  # of it, while it is saved: one run's at a time
    per_token: int = 0  # of a pass that it rides in, for each token of the pass


@dataclass(frozen=True, kw_only=True)
class ResidentRun:
    """A run whose adapter is in memory, or is on its way there."""

    run_id: str
    weight: int  # its priority among the tenant's own runs: 1, 4 or 16
    counter: float  # V among the tenant's own runs: cost charged / weight
    order: int  # number of submission
    microbatches: tuple[Microbatch, ...]  # what is left of its optimizer step or evaluation, in order
    served: int = 0  # cost charged since it became resident
    leaving: bool = False  # it is being saved, or ends: its place comes free by itself
    footprint: Footprint = Footprint()


@dataclass(frozen=True, kw_only=True)
class WaitingRun:
    """The tenant's next run to become resident: by priority, then by submission."""

    run_id: str
    counter: float  # as a resident run's: 0 for a new one, its own for one that was resident before
    order: int
    footprint: Footprint = Footprint()


@dataclass(frozen=True, kw_only=True)
class Tenant:
    """A tenant with a resident or a waiting run, or for whom something was sampled since the last plan."""

    tenant_id: str
    share: float
    counter: float  # V: cost charged / share
    backlogged: bool  # whether the last plan counted it so
    resident: tuple[ResidentRun, ...]
    waiting: WaitingRun | None
    sampled: int = 0  # cost of what was sampled for it, beside training, since the last plan

    @property
    def offers(self) -> bool:
        """Whether it is backlogged now: a resident run has a microbatch to give."""
        return any(run.microbatches for run in self.resident)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything that `plan` may know."""

    tenants: tuple[Tenant, ...]
    token_budget: int  # B: most tokens in one gang
    max_microbatch_cost: int  # L: no microbatch costs more
    fill_min: int  # tokens below which a pass wastes the machine
    max_resident_runs: int
    least_budget: int | None = None  # tokens of a pass that must fit beside who comes into memory; None: B
    least_alone: int | None = None  # the same where nobody else is there, so no other's head; None: least_budget
    memory: int | None = None  # bytes for resident runs and one pass, base and reserve taken off; None: not counted
    min_stay: int = 0  # Q: cost that a run is served before it may have to give way
    floor: float  # the last plan's
    draining: bool  # no run becomes resident

    def __post_init__(self) -> None:
        runs = [run for tenant in self.tenants for run in tenant.resident]
        waiting = [tenant.waiting for tenant in self.tenants if tenant.waiting is not None]
        run_ids = [run.run_id for run in runs] + [run.run_id for run in waiting]
        assert len(set(run_ids)) == len(run_ids), f"a run appears twice: {sorted(run_ids)}"
        assert len({tenant.tenant_id for tenant in self.tenants}) == len(self.tenants), "a tenant appears twice"
        for tenant in self.tenants:
            assert tenant.share > 0, f"{tenant.tenant_id} has share {tenant.share}; a share is above 0"
        for run in runs:
            assert run.weight > 0, f"{run.run_id} has weight {run.weight}; a weight is above 0"
            for head in run.microbatches:
                assert 0 < head.tokens <= self.token_budget, f"{run.run_id}: {head} over {self.token_budget} tokens"
                assert 0 < head.cost <= self.max_microbatch_cost, (
                    f"{run.run_id}: {head} over a cost of {self.max_microbatch_cost}"
                )
