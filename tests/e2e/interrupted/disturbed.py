"""Jobs that something happens to, and what they are to leave in the end."""

from collections.abc import Sequence
from typing import Any

from benchmarks import processes
from benchmarks.oracle import Trace, anomalies
from tests.e2e.making import dataset, submit
from tests.e2e.server import Server, wait_for

VALIDATED = {"validation": 0.3, "training": {"evaluate_every": 4, "checkpoint_every": 8}}
Configs = dict[str, list[tuple[dict[str, Any], int, dict[str, Any]]]]
"""Jobs of tenants: adapter, steps, other fields."""


def submit_all(server: Server, configs: Configs) -> list[str]:
    return [
        submit(server.tenant(name), dataset(server.tenant(name), server.folder), adapter, steps, **fields)
        for name, jobs in configs.items()
        for adapter, steps, fields in jobs
    ]


def left_by(server: Server, jobs: Sequence[str]) -> list[Trace]:
    """What jobs leave when they have succeeded; nothing else is wrong on their server."""
    server.finish(*jobs)
    wait_for(lambda: not anomalies(server), why=lambda: str(anomalies(server)))
    return [Trace.of(server, job) for job in jobs]


def let_an_hour_pass(server: Server) -> None:
    """For what is half done: who began it cannot be about to name it any more. All who could are dead or stopped."""
    processes.let_an_hour_pass(server.data, server.settings.get("database_url"))
