"""What a gang's size costs: speed and peak of memory of the same jobs in gangs of at most so many tokens.

That is what the server's `token_budget` sets. Speeds are of alternating rounds of one process; each peak is that of a
fresh process's first steps.
"""

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.bases import METHODS, Bases
from benchmarks.contenders import Packed, alone
from benchmarks.data import cut_rows, num_tokens
from benchmarks.errors import BenchmarkError
from benchmarks.reports import Report, command, positive
from engine import sources

BUDGETS = (512, 1024, 2048, 4096, 8192)


def main(arguments: list[str]) -> int:
    """Measure, print the table and write the JSON; the exit code."""
    return command(_parser().parse_args(arguments), measure, _show)


def measure(options: argparse.Namespace, console: Console) -> Report:
    """The whole report, as it is written to JSON.

    Raises:
        BenchmarkError, EngineError: for what the options ask for.
    """
    chosen = machine.choose(options.dtype)
    bases = Bases(sources.resolve(options.base), chosen.dtype, chosen.device, options.jobs, options.jobs)
    step = cut_rows(bases.packed, bases.folder, jobs=options.jobs, rows=options.rows, tokens=options.tokens)
    jobs_a_gang = {budget: budget // (options.rows * options.tokens) for budget in options.budgets}
    if not all(jobs_a_gang.values()):
        raise BenchmarkError(
            f"A job has {options.rows * options.tokens} tokens a step, more than the least of --budgets."
        )
    peaks = {}
    processes = machine.fresh_processes(bases.device, preload="benchmarks.contenders")
    for budget, jobs in jobs_a_gang.items():
        with ProcessPoolExecutor(1, mp_context=processes) as pool:
            peaks[budget] = (
                pool.submit(alone, options.method, replace(bases, jobs_a_pass=jobs), step).result().peak_bytes
            )
        console.print(f"gangs of {budget} tokens: {peaks[budget] / 1e9:.2f} GB", highlight=False)
    runs = bases.runs(options.method)
    seconds: dict[int, list[float]] = {budget: [] for budget in jobs_a_gang}
    for number in range(options.rounds + 1):
        for budget, jobs in jobs_a_gang.items():
            began = time.perf_counter()
            Packed(bases.packed, runs, jobs).step(step)
            machine.synchronize(bases.device)
            if number:  # the first does not count
                seconds[budget].append(time.perf_counter() - began)
        console.print(f"round {number} of {options.rounds}" if number else "warm", highlight=False)
    return {
        "benchmark": "budget",
        "machine": chosen.describe(),
        "settings": {
            "base": Path(options.base).name,
            "dtype": chosen.dtype,
            "method": METHODS[options.method],
            "jobs": options.jobs,
            "rows": options.rows,
            "tokens": options.tokens,
            "rounds": options.rounds,
        },
        "budgets": [
            {
                "token_budget": budget,
                "jobs_a_gang": min(jobs, options.jobs),
                "tokens_per_second": num_tokens([step]) / median(seconds[budget]),
                "peak_bytes": peaks[budget],
                "seconds": seconds[budget],
            }
            for budget, jobs in jobs_a_gang.items()
        ],
    }


def _show(report: Report, console: Console) -> None:
    settings, about = report["settings"], report["machine"]
    table = Table(title="Speed and peak of memory by the most tokens of a gang")
    for heading in ("token_budget", "jobs a gang", "tokens/s", "peak GB"):
        table.add_column(heading, justify="right")
    for row in report["budgets"]:
        table.add_row(
            str(row["token_budget"]),
            str(row["jobs_a_gang"]),
            f"{row['tokens_per_second']:.1f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
        )
    console.print(table)
    console.print(
        f"{settings['base']} in {settings['dtype']}, {settings['jobs']} jobs, {settings['method']['method']}, "
        f"r={settings['method']['rank']}, {settings['rows']} rows of {settings['tokens']} tokens each; median of "
        f"{settings['rounds']} rounds. {about['device']}: {about['cpu']}, {about['capability']}, "
        f"{' '.join(about['flags'])}, {about['threads']} threads; torch {about['torch']}.",
        highlight=False,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks budget", description=__doc__)
    parser.add_argument("--budgets", type=positive, nargs="+", default=list(BUDGETS), help="tokens of a gang, at most")
    parser.add_argument("--jobs", type=positive, default=16, help="jobs side by side (16)")
    parser.add_argument("--rows", type=positive, default=4, help="rows of each in a step (4)")
    parser.add_argument("--tokens", type=positive, default=110, help="tokens of a row (110)")
    parser.add_argument("--method", choices=METHODS, default="mixlora")
    parser.add_argument("--base", default=sources.DEFAULT, help="a hub name, a folder or a GGUF file")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--rounds", type=positive, default=3, help="times that each is measured (3)")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    return parser
