"""What nothing that happens on the way may change: the oracle of the tests of faults, and of `chaos`.

It reads the tables and files as they are on disk, by statements of its own and none of the server's.
"""

import hashlib
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

HEARTBEAT_SECONDS = 10.0
"""Between two heartbeats of a daemon, at most, on a busy machine."""


class Data(Protocol):
    """A server's data directory and its database."""

    @property
    def data(self) -> Path: ...

    def rows(self, statement: str, *values: Any) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class Trace:
    """All that is left of a job, and equal to what is left of the same job that nothing disturbed.

    `cost_charged` counts each microbatch, optimizer step and checkpoint: what was done twice is charged once.
    """

    job: dict[str, Any]
    metrics: list[dict[str, Any]]
    expert_loads: list[dict[str, Any]]
    adapters: list[dict[str, Any]]

    @classmethod
    def of(cls, server: Data, job: str) -> "Trace":
        """Of a job that has ended."""
        state = "status, error, step, tokens, exact, cost_charged"
        metrics = "step, epoch, tokens, train_loss, valid_loss, aux_loss, learning_rate, grad_norm, valid_losses"
        adapters = "step, final, sha256, bytes, valid_loss, exact"
        return cls(
            server.rows(f"SELECT {state} FROM jobs JOIN runs ON job_id = jobs.id WHERE jobs.id = ?", job)[0],
            server.rows(f"SELECT {metrics} FROM metrics WHERE job_id = ? ORDER BY step", job),
            server.rows("SELECT step, loads FROM expert_loads WHERE job_id = ? ORDER BY step", job),
            server.rows(f"SELECT {adapters} FROM adapters WHERE job_id = ? ORDER BY step", job),
        )

    def unlike(self, other: "Trace") -> list[str]:
        """The parts in which two jobs differ."""
        return [part for part, mine in vars(self).items() if mine != vars(other)[part]]


def anomalies(server: Data, *, uncollected_seconds: float = 0.0) -> list[str]:
    """What is never right on a server whose jobs have ended, and whose daemon has cleared up after them.

    `uncollected_seconds`: so long a folder without a row may lie there.
    """
    return [
        *not_leased(server),
        *_not_once(server),
        *_not_counted(server),
        *_not_metered(server),
        *_damaged(server),
        *_unnamed(server, uncollected_seconds),
    ]


def not_leased(server: Data) -> Iterator[str]:
    """Jobs that are shown in training, and nobody trains them. That is wrong at any time when a daemon is ready.

    A lease that has expired is seen, and ended, at the next heartbeat of a daemon.
    """
    live = "SELECT epoch FROM daemons WHERE ended_at IS NULL AND expires_at > ?"
    statement = (
        "SELECT jobs.id, status FROM jobs JOIN runs ON job_id = jobs.id "
        f"WHERE status IN ('preparing', 'running') AND (lease_epoch IS NULL OR lease_epoch NOT IN ({live}))"
    )
    for row in server.rows(statement, time.time() - HEARTBEAT_SECONDS):
        yield f"{row['id']} is {row['status']} without a live lease"


def _not_once(server: Data) -> Iterator[str]:
    """Jobs some of whose steps have no metrics, or have them twice."""
    have: dict[str, list[int]] = defaultdict(list)
    for row in server.rows("SELECT job_id, step FROM metrics ORDER BY step"):
        have[row["job_id"]].append(row["step"])
    for job in server.rows("SELECT id, step FROM jobs"):
        if have[job["id"]] != list(range(1, job["step"] + 1)):
            yield f"{job['id']} is at step {job['step']} and has metrics of {have[job['id']]}"


def _not_counted(server: Data) -> Iterator[str]:
    """Jobs whose row says more tokens, or fewer, than their metrics."""
    last = "(SELECT max(metrics.tokens) FROM metrics WHERE job_id = jobs.id)"
    for job in server.rows(f"SELECT id, tokens, {last} AS last FROM jobs"):
        if job["tokens"] != (job["last"] or 0):
            yield f"{job['id']} counts {job['tokens']} tokens and its metrics {job['last']}"


def _not_metered(server: Data) -> Iterator[str]:
    """Tenants who are not metered the tokens of their jobs, of which none was deleted."""
    statement = (
        "SELECT id, (SELECT sum(trained_tokens) FROM counters WHERE tenant_id = tenants.id) AS metered, "
        "(SELECT sum(tokens) FROM jobs WHERE tenant_id = tenants.id) AS sum FROM tenants"
    )
    for tenant in server.rows(statement):
        if (tenant["metered"] or 0) != (tenant["sum"] or 0):
            yield f"{tenant['id']} is metered {tenant['metered']} tokens for {tenant['sum']}"


def _damaged(server: Data) -> Iterator[str]:
    """Adapters whose file is not there, or is not what their row says."""
    for adapter in server.rows("SELECT id, key, sha256 FROM adapters"):
        file = server.data / adapter["key"] / "adapter_model.safetensors"
        if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != adapter["sha256"]:
            yield f"{adapter['id']} is not the file that its row names"


def _unnamed(server: Data, uncollected_seconds: float) -> Iterator[str]:
    """Folders that no row names: half-written ones, and recovery points of jobs that have ended."""
    named = {row["key"] for row in server.rows(_NAMED)}
    for pattern in (
        "adapters/*",
        "uploads/*",
        "datasets/*",
        "jobs/*",
        "operations/*",
        "bases/*",
        "recovery/*",
        "recovery/*/*",
    ):
        for path in server.data.glob(pattern):
            if (key := str(path.relative_to(server.data))) in named:
                continue
            with suppress(FileNotFoundError):  # it has just been collected
                if path.stat().st_mtime <= time.time() - uncollected_seconds:
                    yield f"{key} has no row"


_NAMED = (
    "SELECT key FROM adapters UNION SELECT 'datasets/' || id FROM datasets UNION SELECT tokens_key FROM jobs "
    "UNION SELECT key FROM operations UNION SELECT folder_key FROM bases UNION SELECT key FROM recovery_points "
    "UNION SELECT 'recovery/' || run_id FROM recovery_points"
)
