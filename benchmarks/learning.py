"""What the methods learn of a task, at equal numbers of parameters: the paper's question, on a small scale.

LoRA, DoRA, MixLoRA and MixDoRA train at once on one server, on the same rows with the same settings, and answer the
test rows. A method's accuracy comes with its 95 % confidence interval (Wilson's), a mixture's with how evenly its
experts are used. Nothing here is timed.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.errors import BenchmarkError
from benchmarks.reports import write_json
from engine.probe import choose_device
from mixloom.client import Client
from mixloom.demo.server import serving
from mixloom.demo.tasks import TASKS
from mixloom.jobs import ENDED

LORA = {"method": "lora", "rank": 80}
MIXLORA = {"method": "mixlora", "rank": 16, "num_experts": 8, "top_k": 2}
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": LORA,
    "DoRA": {**LORA, "dora": True},
    "MixLoRA": MIXLORA,
    "MixDoRA": {**MIXLORA, "dora": True},
}
ASKING_AT_ONCE = 64
ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Task:
    """Rows to learn and rows to answer, each with a `completion` and the `answer` in it."""

    name: str
    train: list[dict[str, str]]
    test: list[dict[str, str]]


def main(arguments: list[str]) -> int:
    """Train, ask, print the table and write the JSON; the exit code."""
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        tasks = _tasks(options)
    except (BenchmarkError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    options.dir.mkdir(parents=True, exist_ok=True)
    with serving(options.dir) as server:
        server.wait_until_ready(lambda reason: None)
        operator = Client(server.url, server.admin_key)
        client = Client(server.url, operator.admin.create_tenant("study")["key"])
        results = [result for task in tasks for result in _study(client, task, options, console)]
        base = operator.base()
    report = {
        "benchmark": "learning",
        "machine": machine.describe(choose_device("auto")),
        "base": {"name": base["name"], "dtype": base["dtype"]},
        "settings": {"steps": options.steps, "batch_size": options.batch, "learning_rate": options.learning_rate},
        "results": results,
    }
    console.print(_table(results))
    write_json(report, options.json)
    return 0


def _study(client: Client, task: Task, options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    dataset = client.datasets.upload(task.train, name=task.name)["id"]
    training = {"max_steps": options.steps, "batch_size": options.batch, "learning_rate": options.learning_rate}
    jobs = {
        method: client.jobs.submit(
            name=f"{task.name} {method}", dataset=dataset, validation=0, adapter=adapter, training=training
        )["id"]
        for method, adapter in METHODS.items()
    }
    for states in client.jobs.watch(jobs.values()):
        if all(state["status"] in ENDED for state in states) and any(s["status"] != "succeeded" for s in states):
            raise BenchmarkError(f"A job did not succeed: {[s['error'] for s in states if s['error']]}")
    console.print(f"{task.name}: {len(jobs)} jobs have trained {options.steps} steps each", highlight=False)
    pattern = re.compile(r"\b(" + "|".join(sorted({re.escape(row["answer"]) for row in task.test})) + r")\b")
    results = []
    for method, model in {"base": "base", **jobs}.items():
        right = _right_answers(client, model, task.test, pattern)
        low, high = wilson(right, len(task.test))
        result = {
            "task": task.name,
            "method": method,
            "right": right,
            "asked": len(task.test),
            "accuracy": right / len(task.test),
            "interval_95": [low, high],
        }
        if method != "base":
            losses = [row["train_loss"] for row in client.jobs.metrics(model)]
            result["last_losses_mean"] = mean(losses[-10:])
        if METHODS.get(method, {}).get("method") == "mixlora":
            result["experts"] = _balance(client, model)
        results.append(result)
    return results


def _right_answers(client: Client, model: str, rows: Sequence[dict[str, str]], pattern: re.Pattern[str]) -> int:
    def is_right(row: dict[str, str]) -> bool:
        text = client.generate(model, row["prompt"], max_tokens=ANSWER_TOKENS, temperature=0)["text"]
        said = pattern.search(text.lower() if row["answer"].islower() else text)
        return said is not None and said.group(1) == row["answer"]

    with ThreadPoolExecutor(ASKING_AT_ONCE) as pool:
        return sum(pool.map(is_right, rows))


def _balance(client: Client, job: str) -> dict[str, float]:
    """Of the last step that was kept: the standard deviation of the experts' loads over their mean, by layer."""
    *_, last = client.jobs.experts(job)
    spread = [layer["std"] / layer["mean"] for layer in last["layers"]]
    return {"step": last["step"], "mean_spread": mean(spread), "largest_spread": max(spread)}


def wilson(right: int, asked: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927, without continuity correction)."""
    z = 1.959964
    share, weight = right / asked, z * z / asked
    centre = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / asked + weight / asked / 4) / (1 + weight)
    return centre - half, centre + half


def _tasks(options: argparse.Namespace) -> list[Task]:
    if len(options.train) != len(options.test):
        raise BenchmarkError("Give one --test for each --train, in the same order.")
    if not options.train:
        return [_of_demo(name, options) for name in ("queues",)]
    return [
        Task(train.name.split(".")[0], _read(train), _read(test)[: options.asked])
        for train, test in zip(options.train, options.test, strict=True)
    ]


def _of_demo(name: str, options: argparse.Namespace) -> Task:
    train, test = TASKS[name].train_rows(options.steps * options.batch), TASKS[name].heldout_rows(options.asked)
    with_answers = [[{**row, "answer": row["completion"]} for row in rows] for rows in (train, test)]
    return Task(name, *with_answers)


def _read(file: Path) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if lacking := [
        number for number, row in enumerate(rows, 1) if not {"prompt", "completion", "answer"} <= row.keys()
    ]:
        raise BenchmarkError(f"{file}, line {lacking[0]}: a row needs prompt, completion and answer.")
    return rows


def _table(results: list[dict[str, Any]]) -> Table:
    table = Table("task", "method", "accuracy", "95 % interval", "mean of last losses", "spread of experts")
    for r in results:
        low, high = r["interval_95"]
        experts = r.get("experts")
        table.add_row(
            r["task"],
            r["method"],
            f"{r['accuracy']:.1%} ({r['right']}/{r['asked']})",
            f"{low:.1%} to {high:.1%}",
            f"{r['last_losses_mean']:.3f}" if "last_losses_mean" in r else "",
            f"{experts['mean_spread']:.2f}, at most {experts['largest_spread']:.2f}" if experts else "",
        )
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks learning", description=__doc__)
    add = parser.add_argument
    add("--train", action="append", type=Path, default=[], help="JSONL of prompt, completion, answer; repeat for more")
    add("--test", action="append", type=Path, default=[], help="the test rows of each --train, in the same order")
    add("--steps", type=int, default=20, help="optimizer steps of each job (20)")
    add("--batch", type=int, default=8, help="rows a step (8)")
    add("--asked", type=int, default=200, help="test rows (200, or all there are)")
    add("--learning-rate", type=float, default=5e-4, help="peak, the same for all methods (5e-4)")
    add("--dir", type=Path, default=Path("mixloom-study"), help="where the server keeps its data")
    add("--json", type=Path, help="write the report here")
    return parser
