"""What the server adds to the engine's time: the demo's four jobs of two tenants on the real server, from start to end.

Between the first job's start and the last one's end, what was not spent in passes and optimizer steps: the daemon's
decisions, its books, the copies of what is saved, and what the API and the writing of adapters take from it.
"""

import argparse
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.reports import write_json
from mixloom.client import Client
from mixloom.demo.server import DemoServer, serving
from mixloom.demo.show import TRAINING, jobs_of_the_demo, submit, train


def main(arguments: list[str]) -> int:
    """Serve, train, print the table and write the JSON; the exit code."""
    options = _parser().parse_args(arguments)
    flags = ["--threads", str(options.threads), *(["--base", options.base] if options.base else [])]
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), *flags) as server:
        server.wait_until_ready(lambda reason: None)
        demo_jobs = jobs_of_the_demo()
        length = {} if options.steps is None else {"epochs": None, "max_steps": options.steps}
        submit(server, demo_jobs, {**TRAINING, **length})
        train(demo_jobs)
        report = _report(server, options)
    Console().print(_table(report), highlight=False)
    write_json(report, options.json)
    return 0


def _report(server: DemoServer, options: argparse.Namespace) -> dict[str, Any]:
    operator = Client(server.url, server.admin_key)
    base, detail = operator.base(), operator.admin.daemons()[0]["detail"]
    with closing(sqlite3.connect(server.data / "mixloom.db")) as database:
        began, ended, tokens = database.execute(
            "SELECT min(started_at), max(finished_at), sum(tokens) FROM jobs"
        ).fetchone()
    seconds = {"wall": ended - began, "engine": detail["engine_seconds"]}
    return {
        "benchmark": "overhead",
        "machine": {**machine.describe("cpu"), "threads": options.threads},
        "base": {"name": base["name"], "dtype": base["dtype"]},
        "gangs": detail["gangs"],
        "tokens": tokens,
        "seconds": seconds,
        "outside": 1 - seconds["engine"] / seconds["wall"],
    }


def _table(report: dict[str, Any]) -> Table:
    base, seconds = report["base"], report["seconds"]
    table = Table(
        title=f"The demo's jobs on {base['name']} in {base['dtype']}, {report['machine']['threads']} threads",
        caption=f"{report['tokens']} tokens in {report['gangs']} gangs",
    )
    for heading in ("seconds", "", "of all"):
        table.add_column(heading, justify="left" if heading == "seconds" else "right", no_wrap=True)
    outside = seconds["wall"] - seconds["engine"]
    for name, value in (("in passes and steps", seconds["engine"]), ("outside the engine", outside)):
        table.add_row(name, f"{value:.1f}", f"{value / seconds['wall']:.1%}")
    table.add_row("first start to last end", f"{seconds['wall']:.1f}", "")
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks overhead", description=__doc__)
    parser.add_argument("--base", help="a hub name, a folder or a GGUF file; else the demo's")
    parser.add_argument("--steps", type=int, help="of each job; else one epoch, as in the demo")
    parser.add_argument("--threads", type=int, default=1, help="of the engine (1)")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    return parser
