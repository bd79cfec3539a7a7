"""What a tenant loses to one that is out for the machine's time: the real server, a steady tenant and one more.

Both have the same share. The other one trains as the steady one does, or has many jobs of one short row a step, each of
which writes a checkpoint and is evaluated at every step. What it takes of the time is what the steady one loses of the
speed that it has alone: a half, if prices are right. Windows take turns, since machines are noisy.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.bases import MIXLORA
from benchmarks.reports import Report, positive, write_json
from mixloom.client import Client
from mixloom.demo.server import serving

SHARE = 0.5
MOST = 1.2
"""Of its share: what the other one may take."""
POLL_SECONDS = 0.1
FOR_EVER = 1_000_000
"""Steps."""
LORA, MIXTURE = {"method": "lora", "rank": 16}, {"method": "mixlora", **MIXLORA}
ROWS = [{"prompt": f"{n}, {n + 1}, {n + 2} and so on: what comes next?", "completion": f"{n + 3}."} for n in range(64)]
SHORT = [{"prompt": "1, 2, 3?", "completion": "4."}]
STEADY: dict[str, Any] = {"adapter": LORA, "training": {"batch_size": 8, "checkpoint_every": FOR_EVER}}
TINY: dict[str, Any] = {"batch_size": 1, "checkpoint_every": 1, "keep_checkpoints": 1, "evaluate_every": 1}
ALONE, ORDINARY = "nobody", "one like it"


def main(arguments: list[str]) -> int:
    """Serve, train in turns, compare; print the table and write the JSON; the exit code."""
    options = _parser().parse_args(arguments)
    flags = ["--threads", str(options.threads), *(["--base", options.base] if options.base else [])]
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), *flags) as server:
        server.wait_until_ready(lambda reason: None)
        operator = Client(server.url, server.admin_key)
        steady, other = (Client(server.url, operator.admin.create_tenant(name)["key"]) for name in ("steady", "other"))
        speeds = _measure(steady, other, options)
        base = operator.base()
    report = {
        "benchmark": "adversary",
        "machine": {**machine.describe("cpu"), "threads": options.threads},
        "base": {"name": base["name"], "dtype": base["dtype"]},
        "settings": {"jobs": options.jobs, "steps": options.steps, "rounds": options.rounds},
        "speeds": speeds,
        "taken": taken(speeds),
    }
    Console().print(_table(report), highlight=False)
    write_json(report, options.json)
    return exit_code(report)


def taken(speeds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """What each other one took of the time, ÷ its share: the median of all rounds, each beside its own time alone."""
    alone = speeds[ALONE]
    return {
        beside: median((1 - speed / free) / SHARE for speed, free in zip(of, alone, strict=True))
        for beside, of in speeds.items()
        if beside != ALONE
    }


def exit_code(report: Report) -> int:
    """1 where anyone took more than it may."""
    return 1 if max(report["taken"].values()) > MOST else 0


def _measure(steady: Client, other: Client, options: argparse.Namespace) -> dict[str, list[float]]:
    """The steady tenant's tokens a second, by who is beside it, in each round."""
    rows, long, short = (
        client.datasets.upload(rows, name=name)["id"]
        for client, rows, name in ((steady, ROWS, "rows"), (other, ROWS, "rows"), (other, SHORT, "short"))
    )
    tiny = {"dataset": short, "validation": short, "training": TINY}
    parties: dict[str, list[dict[str, Any]]] = {
        ALONE: [],
        ORDINARY: [{"dataset": long, "validation": 0, **STEADY}] * 2,
        "tiny LoRA jobs": [{**tiny, "adapter": LORA}] * options.jobs,
        "tiny MixLoRA jobs": [{**tiny, "adapter": MIXTURE}] * options.jobs,
    }
    speeds: dict[str, list[float]] = {beside: [] for beside in parties}
    with _training(steady, [{"dataset": rows, "validation": 0, **STEADY}] * 2) as jobs:
        for _ in range(options.rounds):
            for beside, configs in parties.items():
                with _training(other, configs):
                    speeds[beside].append(_speed(steady, jobs, options.steps))
    return speeds


@contextmanager
def _training(client: Client, configs: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """Jobs that have all made a step; in the end they are cancelled and deleted."""
    jobs = [
        client.jobs.submit({**config, "training": {**config["training"], "max_steps": FOR_EVER}})["id"]
        for config in configs
    ]
    while any(client.jobs.get(job)["progress"]["step"] == 0 for job in jobs):
        time.sleep(POLL_SECONDS)
    yield jobs
    for job in jobs:
        client.jobs.cancel(job)
        client.jobs.delete(job)


def _speed(client: Client, jobs: Sequence[str], steps: int) -> float:
    """Tokens a second in so many of its steps, from the end of one to the end of another."""
    seen: list[tuple[float, int, int]] = []
    while len(seen) < 2 or seen[-1][1] < seen[1][1] + steps:
        found = [client.jobs.get(job)["progress"] for job in jobs]
        step, tokens = sum(one["step"] for one in found), sum(one["tokens"] for one in found)
        if not seen or step > seen[-1][1]:
            seen.append((time.monotonic(), step, tokens))
        time.sleep(POLL_SECONDS)
    (began, _, first), (ended, _, last) = seen[1], seen[-1]  # the step of the first one has ended some time before
    return (last - first) / (ended - began)


def _table(report: Report) -> Table:
    base, settings = report["base"], report["settings"]
    table = Table(
        title=f"A steady tenant on {base['name']} in {base['dtype']}, {report['machine']['threads']} threads",
        caption=f"medians of {settings['rounds']} rounds of {settings['steps']} steps; {settings['jobs']} tiny jobs",
    )
    for heading in ("beside it", "its tokens a second", "time the other took ÷ its share"):
        table.add_column(heading, justify="left" if heading == "beside it" else "right")
    for beside, speeds in report["speeds"].items():
        took = report["taken"].get(beside)
        table.add_row(beside, f"{median(speeds):.0f}", "" if took is None else f"{took:.2f}")
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks adversary", description=__doc__)
    parser.add_argument("--base", help="a hub name, a folder or a GGUF file; else the demo's")
    parser.add_argument("--jobs", type=positive, default=12, help="tiny ones at once (12)")
    parser.add_argument("--steps", type=positive, default=20, help="of the steady tenant in a window (20)")
    parser.add_argument("--rounds", type=positive, default=3, help="of windows (3)")
    parser.add_argument("--threads", type=positive, default=2, help="of the engine (2)")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    return parser
