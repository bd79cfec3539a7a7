"""Jobs that something happens to, and what they are to leave in the end."""

import os
from collections.abc import Sequence
from typing import Any

from benchmarks.oracle import Trace, anomalies
from tests.e2e.making import MIXTURE, NARROW, PLAIN, WIDE, dataset, submit
from tests.e2e.server import Server, wait_for

VALIDATED = {"validation": 0.3, "training": {"evaluate_every": 4, "checkpoint_every": 8}}
Configs = dict[str, list[tuple[dict[str, Any], int, dict[str, Any]]]]
"""Jobs of tenants: adapter, steps, other fields."""
LONG: Configs = {
    "alice": [(MIXTURE, 20, {}), (PLAIN, 110, VALIDATED)],
    "bob": [(WIDE, 40, VALIDATED), (NARROW, 75, {})],
}
"""The second outlasts many kills."""
SHORT: Configs = {"alice": [(MIXTURE, 12, VALIDATED)], "bob": [(PLAIN, 14, {})]}


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
    """For what the API has half done: who began it cannot be about to name it any more."""
    for prefix in ("datasets", "jobs", "uploads"):
        for path in server.data.glob(f"{prefix}/*"):
            os.utime(path, (0, 0))
