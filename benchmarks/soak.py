"""Whether a server that has done many jobs is again as small as before: all are deleted in the end.

Tenants send small jobs to the real server on a tiny model; each is trained, published and deleted. The tables are
measured after a VACUUM, of PostgreSQL a FULL one; the files without the ballast, which is the disk's.
"""

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.processes import Processes, running
from benchmarks.reports import write_json
from benchmarks.tiny import write_tiny_base
from mixloom.client import Client
from mixloom.jobs import ENDED

TENANTS = 4
STEPS = 3
MOST_LEFT = 0.05
"""Of what there was before: more that is left counts as a leak."""
METHODS: list[dict[str, Any]] = [
    {"method": "lora", "rank": 4},
    {"method": "mixlora", "rank": 4, "num_experts": 4, "top_k": 2},
]
SETTINGS = {"dtype": "float32", "threads": 1, "recovery_steps": 1, "microbatch_tokens": 256}


def main(arguments: list[str]) -> int:
    """Send, wait, delete, measure, print the table and write the JSON; the exit code, 1 where something is left."""
    options = _parser().parse_args(arguments)
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = write_tiny_base(folder / "base")
        database = {"database_url": options.database_url} if options.database_url else {}
        with running(folder, base, **SETTINGS, **database) as server:
            keys = [server.operator.admin.create_tenant(f"tenant-{n}")["key"] for n in range(TENANTS)]
            clients = [Client(server.url, key) for key in keys]
            sizes = {"before": measure(server)}
            began = time.monotonic()
            with ThreadPoolExecutor(TENANTS) as pool:
                statuses = [status for part in pool.map(_send, clients, _shares(options.jobs)) for status in part]
                seconds = time.monotonic() - began
                sizes["with all of them"] = measure(server)
                list(pool.map(_delete, clients))
            _let_a_day_pass(server)
            _send(clients[0], 1)
            _delete(clients[0])
            sizes["after"] = _settled(server)
    left = {what: sizes["after"][what] / sizes["before"][what] - 1 for what in sizes["before"]}
    report = {
        "benchmark": "soak",
        "machine": machine.describe("cpu"),
        "settings": {
            "jobs": options.jobs,
            "tenants": TENANTS,
            "steps": STEPS,
            "database": "postgresql" if options.database_url else "sqlite",
        },
        "seconds": seconds,
        "jobs_per_minute": 60 * options.jobs / seconds,
        "succeeded": statuses.count("succeeded"),
        "bytes": sizes,
        "left": left,
    }
    console.print(_table(report), highlight=False)
    write_json(report, options.json)
    is_good = report["succeeded"] == options.jobs and max(left.values()) <= MOST_LEFT
    return 0 if is_good else 1


def measure(server: Processes) -> dict[str, int]:
    """Bytes of the tables, after a VACUUM, and of all other files."""
    others = (path for path in server.data.rglob("*") if path.name != "ballast" and not path.name.startswith("mixloom"))
    return {
        "database": server.tables.compact_bytes(),
        "files": sum(path.stat().st_size for path in others if path.is_file()),
    }


def _let_a_day_pass(server: Processes) -> None:
    """For the keys of submissions, which outlive their jobs by design, until somebody submits a day later."""
    server.rows("UPDATE idempotency_keys SET created_at = created_at - 86400")


def _settled(server: Processes) -> dict[str, int]:
    """Once the daemon, too, has erased what was its."""
    recovery = server.data / "recovery"
    end = time.monotonic() + 30
    while recovery.exists() and any(recovery.iterdir()) and time.monotonic() < end:
        time.sleep(0.1)
    return measure(server)


def _shares(jobs: int) -> list[int]:
    return [jobs // TENANTS + (n < jobs % TENANTS) for n in range(TENANTS)]


def _send(client: Client, jobs: int) -> list[str]:
    """One tenant's jobs, a data set for each ten; their last statuses."""
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(8)]
    training = {"max_steps": STEPS, "batch_size": 4}
    data = ""
    ids = []
    for number in range(jobs):
        if number % 10 == 0:
            data = client.datasets.upload(rows, name=f"rows-{number}")["id"]
        adapter = METHODS[number % len(METHODS)]
        ids.append(client.jobs.submit(dataset=data, validation=0, adapter=adapter, training=training)["id"])
    return [_wait(client, id_) for id_ in ids]


def _wait(client: Client, id_: str) -> str:
    while (status := str(client.jobs.get(id_)["status"])) not in ENDED:
        time.sleep(0.5)
    return status


def _delete(client: Client) -> None:
    for job in list(client.jobs.iterate()):
        client.jobs.delete(job["id"])
    for dataset in list(client.datasets.iterate()):
        client.datasets.delete(dataset["id"])


def _table(report: dict[str, Any]) -> Table:
    table = Table(
        title=f"{report['succeeded']} of {report['settings']['jobs']} jobs in {report['seconds']:.0f} s",
        caption=f"{report['jobs_per_minute']:.0f} jobs a minute, then all deleted",
    )
    for heading in ("bytes", *report["bytes"], "left"):
        table.add_column(heading, justify="left" if heading == "bytes" else "right", no_wrap=True)
    for what, left in report["left"].items():
        table.add_row(what, *(f"{sizes[what]:,}" for sizes in report["bytes"].values()), f"{100 * left:+.1f} %")
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks soak", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000, help="jobs of all tenants together (1000)")
    parser.add_argument("--database-url", help="an empty PostgreSQL database; else SQLite in a new folder")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    return parser
