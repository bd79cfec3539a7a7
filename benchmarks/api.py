"""How soon the API answers while jobs train: the real server as processes, asked at a fixed rate for a minute.

Requests come when they are due, whether earlier ones have been answered or not, and the time of each counts from when
it was due: a server that stalls cannot slow the questions down.
"""

import argparse
import asyncio
import random
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.reports import write_json
from benchmarks.tiny import write_tiny_base
from mixloom.client import Client
from mixloom.demo.server import serving

MIX = {"POST /jobs": 1, "GET /jobs/ID": 4, "GET /jobs/ID/events": 2, "GET /jobs/ID/metrics": 3}
"""Parts of ten requests. Metrics are asked for from the last step that the tenant has seen, as `mixloom watch` does."""
NUM_TENANTS = 4
ROWS = [{"prompt": f"{number} and {number}?", "completion": f"{2 * number}"} for number in range(64)]
ADAPTER = {"method": "lora", "rank": 4}
ANSWER_SECONDS = 60.0
"""Who has no answer by then never gets one."""


@dataclass
class Customer:
    """A tenant that asks: its key, its data set, and a job that trains all the while."""

    key: str
    dataset: str
    job: str
    step: int = 0  # of the job, as last seen


@dataclass
class Answers:
    """What came back."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # by kind of request
    failures: Counter[str] = field(default_factory=Counter)  # by kind and status, or the error's name
    accepted: set[str] = field(default_factory=set)  # jobs that were answered with 201


def main(arguments: list[str]) -> int:
    """Serve, train, ask, count; print the table and write the JSON; the exit code, 1 where anything went wrong."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--base", options.base or str(write_tiny_base(Path(folder) / "base"))]
        flags += ["--database-url", options.database_url] if options.database_url else []
        with serving(Path(folder), *flags) as server:
            server.wait_until_ready(lambda reason: None)
            operator = Client(server.url, server.admin_key)
            customers = [_customer(server.url, operator, f"tenant-{number}") for number in range(NUM_TENANTS)]
            _wait_until_training(server.url, customers)
            api = psutil.Process(server.process.pid)
            gangs, cpu_seconds = _gangs(operator), _cpu_seconds(api)
            answers = asyncio.run(_ask(server.url, customers, options.rate, options.seconds))
            gangs, cpu_seconds = _gangs(operator) - gangs, _cpu_seconds(api) - cpu_seconds
            lost = answers.accepted - _jobs(server.url, customers)
    report = _report(answers, options, gangs=gangs, cpu_seconds=cpu_seconds, num_lost=len(lost))
    Console().print(_table(report), highlight=False)
    write_json(report, options.json)
    return exit_code(report)


def exit_code(report: dict[str, Any]) -> int:
    """1 where a request failed, or a job that was accepted has failed or is not there."""
    return 1 if report["failures"] or report["jobs_lost"] else 0


def _customer(url: str, operator: Client, name: str) -> Customer:
    key = operator.admin.create_tenant(name)["key"]
    with Client(url, key) as client:
        dataset = client.datasets.upload(ROWS, name="sums")["id"]
        job = client.jobs.submit(**_job(dataset, steps=1_000_000, batch=8))["id"]
    return Customer(key, dataset, job)


def _job(dataset: str, *, steps: int, batch: int) -> dict[str, Any]:
    return {
        "dataset": dataset,
        "validation": 0,
        "adapter": ADAPTER,
        "training": {"max_steps": steps, "batch_size": batch, "checkpoint_every": 1_000_000},
    }


def _wait_until_training(url: str, customers: list[Customer]) -> None:
    for customer in customers:
        with Client(url, customer.key) as client:
            while client.jobs.get(customer.job)["progress"]["step"] == 0:
                time.sleep(0.1)


def _gangs(operator: Client) -> int:
    return int(operator.admin.daemons()[0]["detail"].get("gangs", 0))


def _cpu_seconds(process: psutil.Process) -> float:
    """Of the process itself: the daemon, its child, is not in it."""
    times = process.cpu_times()
    return float(times.user + times.system)


def _jobs(url: str, customers: list[Customer]) -> set[str]:
    """Those that have not failed."""
    found: set[str] = set()
    for customer in customers:
        with Client(url, customer.key) as client:
            found |= {job["id"] for job in client.jobs.iterate() if job["status"] != "failed"}
    return found


async def _ask(url: str, customers: list[Customer], rate: float, seconds: float) -> Answers:
    """Ask at random moments, `rate` a second on average, and wait for every answer."""
    rng, answers = random.Random(1), Answers()
    kinds = rng.choices(list(MIX), list(MIX.values()), k=round(rate * seconds))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_SECONDS, limits=limits, trust_env=False) as http:
        began, due, asked = time.perf_counter(), 0.0, []
        for kind in kinds:
            due += rng.expovariate(rate)
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
            asked.append(asyncio.create_task(_one(http, kind, rng.choice(customers), began + due, answers)))
        await asyncio.gather(*asked)
    return answers


async def _one(http: httpx.AsyncClient, kind: str, customer: Customer, due: float, answers: Answers) -> None:
    method, path = kind.replace("ID", customer.job).split()
    body = _job(customer.dataset, steps=2, batch=4) if method == "POST" else None
    query = {"from_step": customer.step + 1} if path.endswith("/metrics") else {}
    headers = {"Authorization": f"Bearer {customer.key}"}
    try:
        answer = await http.request(method, path, params=query, json=body, headers=headers)
    except httpx.HTTPError as error:
        answers.failures[f"{kind} {type(error).__name__}"] += 1
        return
    answers.seconds[kind].append(time.perf_counter() - due)
    if answer.is_error:
        answers.failures[f"{kind} {answer.status_code}"] += 1
    elif method == "POST":
        answers.accepted.add(answer.json()["id"])
    elif kind == "GET /jobs/ID":
        customer.step = answer.json()["progress"]["step"]


def _report(
    answers: Answers, options: argparse.Namespace, *, gangs: int, cpu_seconds: float, num_lost: int
) -> dict[str, Any]:
    every = [seconds for all_ in answers.seconds.values() for seconds in all_]
    return {
        "benchmark": "api",
        "machine": machine.describe("cpu"),
        "settings": {
            "rate": options.rate,
            "seconds": options.seconds,
            "base": options.base or "tiny",
            "database": "postgresql" if options.database_url else "sqlite",
        },
        "gangs_meanwhile": gangs,
        "api_cpu_milliseconds_a_request": 1e3 * cpu_seconds / len(every),
        "jobs_accepted": len(answers.accepted),
        "jobs_lost": num_lost,
        "failures": dict(answers.failures),
        "milliseconds": {kind: _milliseconds(answers.seconds[kind]) for kind in MIX} | {"all": _milliseconds(every)},
    }


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    p50, p99 = 1e3 * np.percentile(seconds, [50, 99])
    return {"count": len(seconds), "p50": float(p50), "p99": float(p99), "max": 1e3 * max(seconds)}


def _table(report: dict[str, Any]) -> Table:
    of = report["settings"]
    failures = ", ".join(f"{count} {what}" for what, count in report["failures"].items()) or "none"
    table = Table(
        title=f"{of['rate']:g} requests a second for {of['seconds']:g} s, {of['database']}",
        caption=f"failures: {failures}; jobs accepted {report['jobs_accepted']}, lost {report['jobs_lost']}; "
        f"{report['gangs_meanwhile']} gangs trained meanwhile; the API took "
        f"{report['api_cpu_milliseconds_a_request']:.1f} ms of processor a request",
    )
    for heading in ("milliseconds", "requests", "p50", "p99", "max"):
        table.add_column(heading, justify="left" if heading == "milliseconds" else "right", no_wrap=True)
    for kind, row in report["milliseconds"].items():
        table.add_row(kind, str(row["count"]), *(f"{row[name]:.1f}" for name in ("p50", "p99", "max")))
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks api", description=__doc__)
    parser.add_argument("--rate", type=float, default=50.0, help="requests a second (50)")
    parser.add_argument("--seconds", type=float, default=60.0, help="for so long (60)")
    parser.add_argument("--base", help="a hub name, a folder or a GGUF file; else a tiny random one")
    parser.add_argument("--database-url", help="a PostgreSQL database to use and fill; else SQLite")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    return parser
