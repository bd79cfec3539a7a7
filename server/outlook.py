"""Why a job does not train now, and when it may start and end. Knows no SQL; `server.db.queue` reads for it.

The estimate is a fluid one: a tenant gets its share of the tokens a second that the daemon last measured, its
resident jobs divide that by their priority, its other jobs follow in order. Jobs to come are unknown to it. A tenant
without a place is reckoned to have one now: another's run gives way once it has trained `stay_tokens`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Expectation:
    """Unix seconds; None where nothing can be said."""

    start: float | None = None
    finish: float | None = None


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """The queue at one moment."""

    now: float
    is_daemon_live: bool
    services: Mapping[str, Service]
    """By the hash of each base that daemons serve."""
    drain: OpenDrain | None
    """Of all daemons."""
    tokens_per_second: float | None
    free_places: int
    """Runs that may become resident at once."""
    shares: Mapping[str, float]
    """Of each tenant with jobs that wait or train; they sum to 1."""
    jobs: Mapping[str, Sequence[QueuedJob]]
    """By tenant: those that ride or could if every place were its own, and those that are asked for."""

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

    def expectation(self, tenant_id: str, job_id: str, reason: Reason | None) -> Expectation:
        """When a job may start and end if no other comes."""
        jobs = self.jobs.get(tenant_id, ())
        job = next((job for job in jobs if job.id == job_id), None)
        if job is None or not self.tokens_per_second or reason not in (None, Reason.FAIR_SHARE):
            return Expectation()
        rate = self.tokens_per_second * self.shares[tenant_id]
        num_riding = sum(job.status in RESIDENT for job in jobs) + self.free_places
        if job.place <= num_riding:
            riding = [other for other in jobs if other.place <= num_riding]
            tokens = sum(min(job.tokens_left * other.weight / job.weight, other.tokens_left) for other in riding)
            return Expectation(self.now, self.now + tokens / rate)
        finish = self.now + job.tokens_until / rate
        return Expectation(finish - job.tokens_left / rate, finish)
