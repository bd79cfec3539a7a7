"""Why a job does not train now, and when it may start and end. Knows no SQL; `server.db.queue` reads for it.

The estimate is a fluid one (generalised processor sharing): the speed is the one that the daemons of a base last
measured, and tenants divide it by their shares until they are done. Within a tenant resident jobs do so by priority,
and the others take its places, as many as it has now, in their order; far back in a long queue one follows the other.
Jobs to come are unknown to it, and so are the places and the memory that other tenants leave. A tenant without a place
is reckoned to have one now: another's run gives way once it has trained `stay_tokens`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heapreplace
from typing import NamedTuple

from server.states import REASONS, RESIDENT, JobStatus, Reason


@dataclass(frozen=True)
class QueuedJob:
    """What an estimate asks of a job that waits or trains."""

    id: str
    status: str
    weight: int
    tokens_left: float
    place: int
    """From 1, among its tenant's: resident ones, then the others in the order in which they will become so."""
    tokens_until: float
    """Left of it and of all before it."""
    waits_for_memory: bool


@dataclass(frozen=True, kw_only=True)
class OpenDrain:
    """The drain in force, as a sentence needs it."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Service:
    """What the live daemons of one base can do."""

    drain: OpenDrain | None = None
    """Where each of them is drained."""
    is_disk_full: bool = False
    """Each of them waits for the disk."""
    is_trying: bool = False
    """A run is tried alone, or is to be: nobody else becomes resident."""
    is_starting: bool = False
    """None of them has loaded it yet."""


@dataclass(frozen=True)
class EndingTenant:
    """A tenant with a place, whose jobs are few enough to be added up."""

    share: float
    tokens_left: float
    """Of all its jobs."""


class _Ride(NamedTuple):
    """When a job trains, in its tenant's virtual time: `weight` tokens in each unit."""

    start: float
    finish: float
    weight: int


@dataclass(frozen=True)
class Expectation:
    """Unix seconds; None where nothing can be said."""

    start: float | None = None
    finish: float | None = None


@dataclass(frozen=True, kw_only=True)
class Queue:
    """The jobs of one base, which divide its daemons."""

    tokens_per_second: float | None
    """Of the daemons that are not drained, if any is not."""
    free_places: int
    """Runs that may become resident at once, in the same ones."""
    shares: Mapping[str, float]
    """Of each tenant with jobs that wait or train; they sum to 1."""
    ending: Sequence[EndingTenant]
    """What these leave when they are done is the others'; who is not here is reckoned to go on."""
    jobs: Mapping[str, Sequence[QueuedJob]]
    """By tenant: those that ride or could if every place were its own, and those that are asked for."""

    def expectation(self, now: float, tenant_id: str, job_id: str) -> Expectation:
        """When a job may start and end if no other comes and nothing stands in its way."""
        jobs = self.jobs.get(tenant_id, ())
        job = next((job for job in jobs if job.id == job_id), None)
        if job is None or not self.tokens_per_second:
            return Expectation()
        rides = self._rides[tenant_id]
        if job.place <= len(rides):
            ride = rides[job.place - 1]
            before, until = _trained(rides, ride.start), _trained(rides, ride.finish)
        else:
            before, until = job.tokens_until - job.tokens_left, job.tokens_until
        start, finish = (now + self._of_all(tenant_id, own) / self.tokens_per_second for own in (before, until))
        return Expectation(start, finish)

    @cached_property
    def _rides(self) -> dict[str, list[_Ride]]:
        """Of each tenant, as far as no job between is missing."""
        return {tenant_id: _rides(jobs, self.free_places) for tenant_id, jobs in self.jobs.items()}

    def _of_all(self, tenant_id: str, tokens: float) -> float:
        """What all have trained when a tenant has trained so much: by their shares, and no more than they have left."""
        level = tokens / self.shares[tenant_id]
        return level - sum(max(0.0, level * other.share - other.tokens_left) for other in self.ending)


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """The queues at one moment."""

    now: float
    is_daemon_live: bool
    services: Mapping[str, Service]
    """By the hash of each base that daemons serve."""
    drain: OpenDrain | None
    """Of all daemons."""
    queues: Mapping[str, Queue]
    """By the hash of each base that a job which is asked for was submitted for."""

    def reason(self, status: str, base_hash: str, noted: str | None = None) -> Reason | None:
        """Why a job does not train; None if it does, or if it waits for nobody but its tenant."""
        if status not in (JobStatus.QUEUED, *RESIDENT):
            return None
        if not self.is_daemon_live:
            return Reason.NO_DAEMON
        service = self.services.get(base_hash)
        if service is not None and service.is_disk_full:
            return Reason.DISK
        if status != JobStatus.QUEUED:
            return None
        if self._drain_of(base_hash) is not None:
            return Reason.DRAINING
        if service is None:
            return Reason.WAITING_FOR_BASE
        if service.is_starting:
            return Reason.STARTING
        if service.is_trying:
            return Reason.TRIAL
        return Reason(noted) if noted else Reason.FAIR_SHARE

    def sentence(self, reason: Reason | None, base_hash: str) -> str | None:
        """A reason in words."""
        if reason is None:
            return None
        drain = self._drain_of(base_hash)
        if reason is Reason.DRAINING and drain is not None and drain.reason:
            return f"{REASONS[reason]} Why: {drain.reason}"
        return REASONS[reason]

    def _drain_of(self, base_hash: str) -> OpenDrain | None:
        return self.drain or self.services.get(base_hash, Service()).drain

    def share(self, tenant_id: str, base_hash: str) -> float | None:
        """A tenant's part of the daemons of a base, if it has jobs there that wait or train."""
        return self.queues[base_hash].shares.get(tenant_id)

    def expectation(self, tenant_id: str, job_id: str, base_hash: str, reason: Reason | None) -> Expectation:
        """When a job may start and end if no other comes."""
        if reason not in (None, Reason.FAIR_SHARE, Reason.MEMORY):
            return Expectation()
        return self.queues[base_hash].expectation(self.now, tenant_id, job_id)


def _rides(jobs: Sequence[QueuedJob], free_places: int) -> list[_Ride]:
    """A place that comes free is the next job's; where one waits for memory, none is free."""
    if any(job.waits_for_memory for job in jobs):
        free_places = 0
    places = [0.0] * max(1, sum(job.status in RESIDENT for job in jobs) + free_places)
    rides = []
    for place, job in enumerate(jobs, 1):
        if job.place != place:
            break
        ride = _Ride(places[0], places[0] + job.tokens_left / job.weight, job.weight)
        heapreplace(places, ride.finish)
        rides.append(ride)
    return rides


def _trained(rides: Sequence[_Ride], time: float) -> float:
    """Tokens of all of them until then."""
    return sum((min(time, ride.finish) - ride.start) * ride.weight for ride in rides if ride.start < time)
