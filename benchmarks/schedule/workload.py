"""Who submits what, and when: drawn from a seed. Time is in token-equivalents, as in `timing`."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.schedule.timing import PASS_TOKENS, Timing, Unit

MICROBATCH_TOKENS = 1024
SHARES = (1.0, 2.0, 4.0, 8.0)
ZIPF = 1.1  # tenant k submits in proportion to 1 / k^1.1
MEDIAN_TOKENS, SIGMA, MOST_TOKENS = 2_000, 1.5, 2_000_000
PARETO_PART, PARETO_SHAPE, PARETO_TOKENS = 0.01, 1.5, 20_000
BURSTS = 5  # an on-off tenant submits within so many bursts, each a two-hundredth of the time
NUM_SMALL = 20  # tenants of one small job, of each share
SMALL_SHARES = (1.0, 10.0)
FLOODER = "flooder"
ADVERSARY = "adversary"
FLOOD_BEGINS = 0.3  # of the time in which jobs arrive
FAILED, CANCELLED = 0.15, 0.1  # of all jobs
MOST_PATIENCE = 20.0  # times what a job takes alone; who cancels does so within that


@dataclass(frozen=True)
class Job:
    """Units that are done in turns, `num_rounds` times, unless it is cancelled before."""

    tenant: str
    arrival: float
    units: tuple[Unit, ...]
    num_rounds: int
    patience: float = math.inf  # from its arrival until it is cancelled

    @property
    def takes(self) -> float:
        """How long its work takes, without passes."""
        return self.num_rounds * sum(sum(unit.takes) for unit in self.units)

    @property
    def alone(self) -> float:
        """How long it takes on an empty machine: a pass for each unit."""
        return self.takes + self.num_rounds * len(self.units) * PASS_TOKENS


@dataclass(frozen=True)
class Workload:
    """Tenants with their shares, and jobs in order of arrival."""

    shares: dict[str, float]
    jobs: list[Job]

    def without(self, tenant: str) -> "Workload":
        """As if it had never come."""
        return Workload(
            {name: share for name, share in self.shares.items() if name != tenant},
            [job for job in self.jobs if job.tenant != tenant],
        )


def draw(timing: Timing, *, num_tenants: int, num_jobs: int, load: float, seed: int) -> Workload:
    """Tenants by Zipf's law, every other one on and off; a tenth of the jobs is the flooder's, all at once.

    Those of the others would keep `load` of the machine busy if none were cancelled. Some fail: they end early.
    """
    rng = random.Random(seed)
    names = [f"t{number:04}" for number in range(num_tenants)]
    shares = {name: rng.choice(SHARES) for name in names}
    activity = [(number + 1) ** -ZIPF for number in range(num_tenants)]
    num_flood = num_jobs // 10
    owners = rng.choices(names, activity, k=num_jobs - num_flood - NUM_SMALL * len(SMALL_SHARES))
    fates = random.Random(f"fates {seed}")
    drawn = [_with_fate(fates, _draw_job(rng, timing, owner)) for owner in owners]
    end = sum(job.takes for job in drawn) / load
    bursts = {name: [rng.uniform(0, 0.995 * end) for _ in range(BURSTS)] for name in names[1::2]}
    jobs = [_at(job, _arrival(rng, bursts.get(job.tenant), end)) for job in drawn]
    shares[FLOODER] = 1.0
    flood = [_with_fate(fates, _draw_job(rng, timing, FLOODER)) for _ in range(num_flood)]
    jobs += [_at(job, FLOOD_BEGINS * end) for job in flood]
    for share in SMALL_SHARES:
        for number in range(NUM_SMALL):
            name = small(share, number)
            shares[name] = share
            unit = timing.step("lora", [400])
            jobs.append(Job(name, end * (FLOOD_BEGINS + rng.uniform(0.001, 0.05)), (unit,), num_rounds=10))
    return Workload(shares, sorted(jobs, key=lambda job: job.arrival))


def small(share: float, number: int) -> str:
    """The name of a tenant with one small job."""
    return f"small-{share:g}-{number}"


def beside_an_adversary(timing: Timing, method: str, *, num_jobs: int, num_others: int, tokens: int) -> Workload:
    """Tenants of equal share with work of `tokens` each; one has jobs of batch 1 that evaluate and save every step."""
    rows = [_sizes(MICROBATCH_TOKENS // 8, batch) for batch in (8, 16)]
    jobs = []
    for number in range(num_others):
        unit = timing.step(timing.methods[number % len(timing.methods)], rows[number % len(rows)])
        num_tokens = sum(one.tokens for one in unit.microbatches)
        jobs.append(Job(f"t{number}", 0.0, (unit,), num_rounds=tokens // num_tokens))
    units = (timing.step(method, [24], checkpoint=True), timing.evaluation(method, [24]))
    jobs += [Job(ADVERSARY, 0.0, units, num_rounds=tokens // 24) for _ in range(num_jobs)]
    return Workload({job.tenant: 1.0 for job in jobs}, jobs)


def _draw_job(rng: random.Random, timing: Timing, tenant: str) -> Job:
    """Lognormal in its tokens with a tail of Pareto's, lognormal in the length of its rows."""
    size = rng.lognormvariate(0.0, SIGMA) * MEDIAN_TOKENS
    if rng.random() < PARETO_PART:
        size = rng.paretovariate(PARETO_SHAPE) * PARETO_TOKENS
    row = min(max(round(rng.lognormvariate(0.0, 0.7) * 120), 16), MICROBATCH_TOKENS)
    sizes = _sizes(row, rng.choice((4, 8, 16)))
    unit = timing.step(rng.choice(timing.methods), sizes)
    return Job(tenant, 0.0, (unit,), num_rounds=max(1, round(min(size, MOST_TOKENS) / sum(sizes))))


def _with_fate(rng: random.Random, job: Job) -> Job:
    """It fails somewhere on its way, or is cancelled, waiting or training; most do neither."""
    fate = rng.random()
    if fate < FAILED:
        return replace(job, num_rounds=max(1, round(job.num_rounds * rng.random())))
    if fate < FAILED + CANCELLED:
        return replace(job, patience=rng.uniform(0.0, MOST_PATIENCE) * job.alone)
    return job


def _sizes(row: int, batch: int) -> list[int]:
    """Microbatches of whole rows."""
    most = MICROBATCH_TOKENS // row
    return [row * min(most, batch - start) for start in range(0, batch, most)]


def _arrival(rng: random.Random, bursts: Sequence[float] | None, end: float) -> float:
    """Poisson, given how many there are; in one of its bursts for a tenant that has some."""
    return rng.uniform(0, end) if bursts is None else rng.choice(bursts) + rng.uniform(0, 0.005 * end)


def _at(job: Job, arrival: float) -> Job:
    return replace(job, arrival=arrival)
