"""The states of a job, and the one table of transitions between them."""

from enum import StrEnum


class JobStatus(StrEnum):
    QUEUED = "queued"  # waits for its turn; `reason` says for what
    PREPARING = "preparing"  # the daemon is loading its adapter and its tokens
    RUNNING = "running"  # resident: its microbatches ride in gangs
    PAUSED = "paused"  # the tenant's wish, and only that
    SUCCEEDED = "succeeded"  # its adapter is there
    FAILED = "failed"  # `error` says why
    CANCELLED = "cancelled"  # the tenant's wish; final


TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset({JobStatus.PREPARING, JobStatus.PAUSED, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.PREPARING: frozenset({JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.RUNNING: frozenset(
        {JobStatus.QUEUED, JobStatus.PAUSED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED}
    ),
    JobStatus.PAUSED: frozenset({JobStatus.QUEUED, JobStatus.CANCELLED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}

RESIDENT = (JobStatus.PREPARING, JobStatus.RUNNING)
"""A daemon holds the job's run."""

ENDED = frozenset(status for status, after in TRANSITIONS.items() if not after)


def sources(target: JobStatus) -> list[str]:
    """The statuses from which a job may become `target`; every status update names them in its `where`."""
    return [status.value for status, after in TRANSITIONS.items() if target in after]


class Reason(StrEnum):
    """Why a queued job does not train now."""

    FAIR_SHARE = "fair_share"
    MEMORY = "memory"
    DRAINING = "draining"
    DISK = "disk"
    TRIAL = "trial"
    STARTING = "starting"
    WAITING_FOR_BASE = "waiting_for_base"
    NO_DAEMON = "no_daemon"


REASONS = {
    Reason.FAIR_SHARE: "It waits for its turn: other jobs come first.",
    Reason.MEMORY: "It waits for memory: it does not fit beside the jobs that train now.",
    Reason.DRAINING: "The operator is draining the server; it goes on after `mixloom admin undrain`.",
    Reason.DISK: "The server's disk is full; it goes on when there is space.",
    Reason.TRIAL: "The engine died again and again; the jobs that trained each time are tried one at a time first.",
    Reason.STARTING: "The engine daemon is loading the base model; it goes on when that is done.",
    Reason.WAITING_FOR_BASE: "It waits for a server with the base model that it was submitted for.",
    Reason.NO_DAEMON: "No engine daemon is running; it goes on when one is back.",
}
