"""A training pass of long rows with the setting `recompute` and without: peak of memory, time, and whether bits differ.

Both bases are in one process, and their passes take turns. The peak is what torch's allocator was asked for beside the
base and the run. Seconds are the clock's, the least of some repeats.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.bases import DROPOUT, METHODS, target_modules
from benchmarks.costs import Watch
from benchmarks.reports import Report, command, positive
from engine import base_model, sources
from engine.config import AdapterConfig
from engine.engine import Engine
from engine.memory import allocations
from engine.run import Microbatch, Row


def main(arguments: list[str]) -> int:
    """Measure, print the table and write the JSON; the exit code."""
    return command(_parser().parse_args(arguments), measure, _show)


def measure(options: argparse.Namespace, console: Console) -> Report:
    """The whole report, as it is written to JSON."""
    chosen = machine.choose(options.dtype)
    folder, dtype = sources.resolve(options.base), getattr(torch, chosen.dtype)
    engines = {
        recompute: Engine(
            base_model.load(folder, name=folder.name, dtype=dtype, device=chosen.device, recompute=recompute)
        )
        for recompute in (False, True)
    }
    watch = Watch(chosen.device, options.repeats)
    rows: list[Report] = []
    for method in options.methods:
        passes = {recompute: _Pass(engine, method, options) for recompute, engine in engines.items()}
        seconds = {recompute: watch(pass_.train) for recompute, pass_ in passes.items()}
        for recompute, pass_ in passes.items():
            peak = allocations(pass_.train, engines[recompute].base.device).peak
            rows.append({"method": method, "recompute": recompute, "seconds": seconds[recompute], "peak_bytes": peak})
        without, with_ = passes.values()
        rows[-1]["same_bits"] = torch.equal(without.run.gradient, with_.run.gradient)
    return {
        "benchmark": "recompute",
        "machine": chosen.describe(),
        "settings": {
            "base": Path(options.base).name,
            "dtype": chosen.dtype,
            "rows": options.rows,
            "tokens_a_row": options.tokens,
        },
        "rows": rows,
    }


class _Pass:
    """One pass of a fresh adapter; its gradient grows with each, the same way in both engines."""

    def __init__(self, engine: Engine, method: str, options: argparse.Namespace):
        config = {"dropout": DROPOUT, "target_modules": target_modules(engine.base.model), **METHODS[method]}
        self.engine = engine
        self.run = engine.create_run(AdapterConfig.from_dict(config), seed=0)
        tokens = np.random.default_rng(0).integers(0, engine.base.config.vocab_size, (options.rows, options.tokens))
        targets, weights = np.arange(1, options.tokens), np.full(options.tokens - 1, 1 / tokens.size)
        self.rows = [Row(row, targets, weights) for row in tokens]

    def train(self) -> None:
        self.engine.forward_backward([Microbatch(rows=self.rows, run=self.run)])


def _show(report: Report, console: Console) -> None:
    settings, about = report["settings"], report["machine"]
    table = Table("method", "recompute", "peak MB", "seconds", "same bits")
    for row in report["rows"]:
        table.add_row(
            row["method"],
            str(row["recompute"]),
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['seconds']:.2f}",
            str(row.get("same_bits", "")),
        )
    console.print(table)
    console.print(
        f"{settings['base']} in {settings['dtype']}; {settings['rows']} rows of {settings['tokens_a_row']} tokens; "
        f"{about['device']}: {about['cpu']}, {about['threads']} threads, torch {about['torch']}.",
        highlight=False,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks recompute", description=__doc__)
    parser.add_argument("--tokens", type=positive, default=1024, help="of a row (1024)")
    parser.add_argument("--rows", type=positive, default=1, help="of the pass (1)")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=["lora", "mixlora"])
    parser.add_argument("--repeats", type=positive, default=3, help="of each pass that is timed (3)")
    parser.add_argument("--base", default=sources.DEFAULT, help="a hub name, a folder or a GGUF file")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    return parser
