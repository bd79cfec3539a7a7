"""What it gains to train small jobs in one pass: all of them together over one job a pass, by their number and size.

Both ways take the same optimizer steps, in alternating rounds of one process. Only ratios of one run count.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.bases import METHODS, Bases
from benchmarks.contenders import Packed
from benchmarks.data import Step, cut_rows, num_tokens
from benchmarks.reports import command, positive
from engine import sources
from engine.run import Run

PASS_TOKENS = 4096
"""Most tokens of a pass, as the server's default `token_budget`: larger cells take more passes than one."""
QUICK: dict[str, Any] = {"jobs": [1, 4], "rows": [1], "tokens": [40], "rounds": 1}


@dataclass(frozen=True)
class Turn:
    """One optimizer step of all jobs, in seconds."""

    passes: float
    optimizer: float


def main(arguments: list[str]) -> int:
    """Measure, print the table and write the JSON; the exit code."""
    options = _parser().parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK)
    return command(options, measure, _show)


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The whole report, as it is written to JSON.

    Raises:
        BenchmarkError, EngineError: for what the options ask for.
    """
    chosen = machine.choose(options.dtype)
    device, dtype = chosen.device, chosen.dtype
    bases = Bases(sources.resolve(options.base), dtype, device, jobs=max(options.jobs), jobs_a_pass=max(options.jobs))
    runs = bases.runs(options.method)
    cells = []
    for tokens in options.tokens:
        for rows in options.rows:
            for jobs in options.jobs:
                step = cut_rows(bases.packed, bases.folder, jobs=jobs, rows=rows, tokens=tokens)
                cells.append(_cell(bases, runs[:jobs], step, options.rounds))
                console.print(f"{jobs} jobs, {rows} rows of {tokens} tokens: {cells[-1]['gain']:.2f}", highlight=False)
    return {
        "benchmark": "sweep",
        "machine": chosen.describe(),
        "settings": {
            "base": Path(options.base).name,
            "dtype": dtype,
            "method": METHODS[options.method],
            "rounds": options.rounds,
            "pass_tokens": PASS_TOKENS,
        },
        "cells": cells,
    }


def _cell(bases: Bases, runs: Sequence[Run], step: Step, rounds: int) -> dict[str, Any]:
    jobs, tokens = len(runs), num_tokens([step])
    jobs_a_pass = min(jobs, max(1, PASS_TOKENS * jobs // tokens))
    ways = {"together": jobs_a_pass, "one_by_one": 1}
    contenders = {name: Packed(bases.packed, list(runs), jobs_a_pass) for name, jobs_a_pass in ways.items()}
    turns: dict[str, list[Turn]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, contender in contenders.items():
            turn = _turn(contender, step, bases.device)
            if number:  # the first does not count
                turns[name].append(turn)
    passes = {name: median(turn.passes for turn in turns[name]) for name in ways}
    seconds = {name: median(turn.passes + turn.optimizer for turn in turns[name]) for name in ways}
    return {
        "jobs": jobs,
        "rows": len(step[0]),
        "tokens": len(step[0][0].tokens),
        "jobs_a_pass": jobs_a_pass,
        "tokens_per_second": {name: tokens / seconds[name] for name in ways},
        "gain": seconds["one_by_one"] / seconds["together"],
        "gain_of_passes": passes["one_by_one"] / passes["together"],
        "turns": {name: [asdict(turn) for turn in turns[name]] for name in ways},
    }


def _turn(contender: Packed, step: Step, device: str) -> Turn:
    machine.synchronize(device)
    began = time.perf_counter()
    contender.forward_backward(step)
    machine.synchronize(device)
    passed = time.perf_counter()
    contender.optim_step()
    machine.synchronize(device)
    return Turn(passed - began, time.perf_counter() - passed)


def _show(report: dict[str, Any], console: Console) -> None:
    settings, about = report["settings"], report["machine"]
    table = Table(
        title="Packing gain: all jobs together over one job a pass",
        caption="Optimizer steps are in the speeds and the gain, which no packing makes faster; not in that of passes.",
    )
    for heading in ("jobs", "rows", "tokens", "together, tokens/s", "one by one", "gain", "of passes"):
        table.add_column(heading, justify="right")
    for cell in report["cells"]:
        speeds = cell["tokens_per_second"]
        table.add_row(
            *(str(cell[key]) for key in ("jobs", "rows", "tokens")),
            f"{speeds['together']:.1f}",
            f"{speeds['one_by_one']:.1f}",
            f"{cell['gain']:.2f}",
            f"{cell['gain_of_passes']:.2f}",
        )
    console.print(table)
    console.print(
        f"{settings['base']} in {settings['dtype']}, {settings['method']['method']}, r={settings['method']['rank']}; "
        f"rows are of one job in a step; passes of at most {settings['pass_tokens']} tokens; median of "
        f"{settings['rounds']} rounds. {about['device']}: {about['cpu']}, {about['capability']}, "
        f"{' '.join(about['flags'])}, {about['threads']} threads; torch {about['torch']}.",
        highlight=False,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks sweep", description=__doc__)
    parser.add_argument("--jobs", type=positive, nargs="+", default=[1, 4, 16], help="jobs side by side (1 4 16)")
    parser.add_argument("--rows", type=positive, nargs="+", default=[1, 2, 8], help="rows of each in a step (1 2 8)")
    parser.add_argument("--tokens", type=positive, nargs="+", default=[40, 110], help="tokens of a row (40 110)")
    parser.add_argument("--method", choices=METHODS, default="mixlora")
    parser.add_argument("--base", default=sources.DEFAULT, help="a hub name, a folder or a GGUF file")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--rounds", type=positive, default=3, help="times that each way is measured (3)")
    parser.add_argument("--quick", action="store_true", help="1 and 4 jobs of one row of 40 tokens, one round")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    return parser
