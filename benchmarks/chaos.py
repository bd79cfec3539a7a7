"""Whether every job ends as if nothing had happened, when the server's processes are killed again and again.

The real server on a tiny model trains the same jobs of several tenants in rounds. The first round is left alone. In
the others the daemon, the API or both get kill -9 at random moments, also while they start; or the daemon is stopped,
so that another one overtakes it, and may wake up then. At the end of each round stands the oracle.
"""

import argparse
import random
import secrets
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.errors import BenchmarkError
from benchmarks.oracle import Trace, anomalies, not_leased
from benchmarks.processes import Processes, let_an_hour_pass, running, with_signal
from benchmarks.reports import write_json
from benchmarks.tiny import write_tiny_base
from mixloom.client import Client
from server.orphans import SAFE_SECONDS

VICTIMS = ("daemon", "api", "both", "stopped")
"""Who is killed; `stopped`: the API, and its daemon is stopped before."""
SETTINGS = {"dtype": "float32", "threads": 1, "recovery_steps": 5, "microbatch_tokens": 256, "token_budget": 1024}
SHARED = {"lease_seconds": 10}
"""On PostgreSQL, where who overtakes a daemon has to wait until its lease is over."""
EARLY_SECONDS = 4.0
"""In which a daemon starts, about."""
LATE_SECONDS = 0.5
"""Some gangs."""

VALIDATED = {"validation": 0.3, "training": {"evaluate_every": 4, "checkpoint_every": 8}}
MIXTURE = {"method": "mixlora", "rank": 4, "num_experts": 4, "top_k": 2}
JOBS: dict[str, list[tuple[dict[str, Any], int, dict[str, Any]]]] = {
    "alice": [(MIXTURE, 60, {}), ({"method": "lora", "rank": 8}, 150, VALIDATED)],
    "bob": [({**MIXTURE, "num_experts": 2, "top_k": 1, "dropout": 0.2}, 120, VALIDATED)],
    "carol": [({"method": "lora", "rank": 4, "dora": True}, 90, {}), ({**MIXTURE, "dora": True}, 30, {})],
}
"""Of each tenant: adapter, steps, other fields."""


@dataclass
class Chaos:
    """What has happened so far, and where it left a trace."""

    server: Processes
    clients: dict[str, Client]
    chance: random.Random
    num_kills: int
    kills: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    failures: list[str] = field(default_factory=list)
    reached: dict[str, int] = field(default_factory=dict)  # job -> the step at which the last kill met it
    was_early: bool = False

    def undisturbed(self) -> list[Trace]:
        """What the jobs leave when nothing happens."""
        return self._traces(self._submit())

    def round(self, undisturbed: list[Trace]) -> None:
        """The jobs once more, disturbed as long as they train."""
        self.rounds += 1
        jobs = self._submit()
        while self.kills.total() < self.num_kills and self._is_next_moment(jobs):
            self._strike(jobs)
        found = self._traces(jobs)
        for job, mine, expected in zip(jobs, found, undisturbed, strict=True):
            if parts := mine.unlike(expected):
                self.failures.append(f"round {self.rounds}: {job} ({mine.job['status']}) differs in {', '.join(parts)}")

    def _submit(self) -> list[str]:
        rows = [{"prompt": f"What is {n:03}?", "completion": f"It is {n:03}."} for n in range(10)]
        ids = []
        for name, jobs in JOBS.items():
            client = self.clients[name]
            data = client.datasets.upload(rows, name="rows")["id"]
            for adapter, steps, fields in jobs:
                training = {"max_steps": steps, "batch_size": 2, "learning_rate": 5e-3, **fields.get("training", {})}
                job = client.jobs.submit(dataset=data, adapter=adapter, **{**fields, "training": training})
                ids.append(job["id"])
        return ids

    def _training(self, jobs: list[str]) -> dict[str, int]:
        """Step of each job that has not ended."""
        marks = ", ".join("?" * len(jobs))
        statement = f"SELECT id, step FROM jobs WHERE id IN ({marks}) AND finished_at IS NULL"
        return {row["id"]: row["step"] for row in self.server.rows(statement, *jobs)}

    def _is_next_moment(self, jobs: list[str]) -> bool:
        """Wait for it; False if the jobs end before.

        An early one meets a daemon that starts. The one after it waits until each job is further than any kill has met
        it: when the daemon dies again and again in one place, the server suspects the job, and fails it in the end.
        """
        self.was_early = not self.was_early and self.chance.random() < 0.25
        if self.was_early:
            self.server.wait(lambda: self.server.daemon, "A daemon was to start")
            time.sleep(self.chance.uniform(0, EARLY_SECONDS))
        else:
            self.server.wait(lambda: self._is_further(jobs), "Each job was to get further")
            time.sleep(self.chance.uniform(0, LATE_SECONDS))
        return bool(self._training(jobs))

    def _is_further(self, jobs: list[str]) -> bool:
        if not self.server.is_ready():
            return False
        self._note(not_leased(self.server))
        training = self._training(jobs)
        return all(step > self.reached.get(job, 0) for job, step in training.items())

    def _strike(self, jobs: list[str]) -> None:
        victim = self.chance.choice(VICTIMS)
        self.kills[victim] += 1
        for job, step in self._training(jobs).items():
            self.reached[job] = max(step, self.reached.get(job, 0))
        daemon, api = self.server.wait(lambda: self.server.daemon, "A daemon was to start"), self.server.api
        assert api is not None
        if victim == "stopped":
            self.server.stop(daemon)
        if victim in ("daemon", "both"):
            with_signal(daemon, signal.SIGKILL)
        if victim != "daemon":
            api.kill()
            api.wait()
            self.server.spawn()
        if victim == "stopped" and self.chance.random() < 0.5:  # else who overtakes it has to end it
            time.sleep(self.chance.uniform(0, EARLY_SECONDS))
            with_signal(daemon, signal.SIGCONT)

    def _traces(self, jobs: list[str]) -> list[Trace]:
        """Of jobs, when they have ended and the daemon has cleared up after them."""
        self.server.wait(lambda: self.server.is_ready() and not self._training(jobs), "The jobs were to end")
        self._note(self._anomalies(SAFE_SECONDS))
        return [Trace.of(self.server, job) for job in jobs]

    def let_an_hour_pass(self) -> None:
        """For all files; then none is left without a row, once the daemon has started again."""
        daemon = self.server.daemon
        assert daemon is not None
        with_signal(daemon, signal.SIGKILL)
        let_an_hour_pass(self.server.data, self.server.database_url)
        self.server.wait(lambda: not daemon.is_running() and self.server.is_ready(), "A daemon was to start again")
        self._note(self._anomalies(0.0))

    def _anomalies(self, uncollected_seconds: float) -> list[str]:
        """Those that a daemon does not mend within half a minute."""
        end = time.monotonic() + 30
        while found := anomalies(self.server, uncollected_seconds=uncollected_seconds):
            if time.monotonic() > end:
                break
            time.sleep(0.2)
        return found

    def _note(self, found: Iterable[str]) -> None:
        self.failures += [one for one in (f"round {self.rounds}: {what}" for what in found) if one not in self.failures]


def main(arguments: list[str]) -> int:
    """Disturb, compare, print the table and write the JSON; the exit code, 1 where anything differs."""
    options = _parser().parse_args(arguments)
    console = Console()
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    console.print(f"seed {seed}", highlight=False)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        base = write_tiny_base(Path(name) / "base")
        database = {"database_url": options.database_url, **SHARED} if options.database_url else {}
        with running(Path(name), base, **SETTINGS, **database) as server:
            clients = {one: Client(server.url, server.operator.admin.create_tenant(one)["key"]) for one in JOBS}
            chaos = Chaos(server, clients, random.Random(seed), options.kills)
            try:
                undisturbed = chaos.undisturbed()
                while chaos.kills.total() < options.kills:
                    chaos.round(undisturbed)
                chaos.let_an_hour_pass()
            except BenchmarkError as error:
                chaos.failures.append(f"round {chaos.rounds}: {error}")
    report = {
        "benchmark": "chaos",
        "machine": machine.describe("cpu"),
        "settings": {
            "kills": options.kills,
            "seed": seed,
            "database": "postgresql" if options.database_url else "sqlite",
        },
        "seconds": time.monotonic() - began,
        "kills": {victim: chaos.kills[victim] for victim in VICTIMS},
        "rounds": chaos.rounds,
        "jobs": chaos.rounds * sum(map(len, JOBS.values())),
        "failures": chaos.failures,
    }
    console.print(_table(report), highlight=False)
    summary = f"{report['jobs']} jobs in {chaos.rounds} rounds, {report['seconds']:.0f} s"
    console.print(f"{summary}: {len(chaos.failures)} failures", highlight=False)
    for failure in chaos.failures:
        console.print(failure, highlight=False, markup=False)
    write_json(report, options.json)
    return 1 if chaos.failures else 0


def _table(report: dict[str, Any]) -> Table:
    table = Table()
    table.add_column("killed")
    table.add_column("times", justify="right")
    for victim, times in report["kills"].items():
        table.add_row(victim, str(times))
    table.add_row("all", str(sum(report["kills"].values())))
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="in all (100); jobs are sent until it is done")
    parser.add_argument("--seed", type=int, help="of all chances; else one is drawn, and printed")
    parser.add_argument("--database-url", help="an empty PostgreSQL database; else SQLite in a new folder")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    return parser
