"""What a recovery point costs who trains: the copy, for which the gang waits, and the writing beside it.

A gang is one optimizer step of a run, forward, backward and update, as the daemon's loop drives the engine; a point
is captured and handed to the daemon's own writer before the next gang. By the clock: the disk takes no processor's.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.bases import DROPOUT, MIXLORA, target_modules
from benchmarks.reports import write_json
from engine import base_model, recovery, sources
from engine.config import AdapterConfig
from engine.engine import Engine
from engine.run import Microbatch, Row, Run
from server.daemon.writer import Writer
from server.store import LocalStore

ROWS, ROW_TOKENS = 8, 64


class Points:
    """Recovery points of one run, at the disk under `folder`."""

    def __init__(self, run: Run, folder: Path):
        self.run = run
        self.store = LocalStore(folder)
        self.writer = Writer(self.store)
        self.copying: list[float] = []
        self.writing: list[float] = []
        self._count = 0

    def save(self) -> None:
        """Copy the run, and let the copy be written."""
        began = time.perf_counter()
        snapshot = recovery.capture(self.run)
        self.copying.append(time.perf_counter() - began)
        self._count += 1
        key = f"recovery/{self._count}"

        def erase(files: object) -> None:
            self.writing.append(time.perf_counter() - began - self.copying[-1])
            self.writer.delete(key)

        self.writer.put(key, lambda place: recovery.write(snapshot, place), erase)


def main(arguments: list[str]) -> int:
    """Measure, print the table and write the JSON; the exit code."""
    options = _parser().parse_args(arguments)
    console = Console()
    chosen = machine.choose(options.dtype)
    device, dtype = chosen.device, chosen.dtype
    base = base_model.load(
        sources.resolve(options.base), name=Path(options.base).name, dtype=getattr(torch, dtype), device=device
    )
    engine = Engine(base)
    config = AdapterConfig.from_dict(
        {"method": "mixlora", **MIXLORA, "dropout": DROPOUT, "target_modules": target_modules(base.model)}
    )
    run = engine.create_run(config, 0)
    rows = [_row(number) for number in range(ROWS)]

    def gang() -> float:
        began = time.perf_counter()
        engine.forward_backward([Microbatch(rows=rows, run=run)])
        engine.optim_step(run, learning_rate=1e-4)
        machine.synchronize(device)
        return time.perf_counter() - began

    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        points = Points(run, Path(folder))
        gang()
        alone, beside = [], []
        for _ in range(options.gangs):  # in turns: what else the machine does falls on both
            alone.append(gang())
            points.save()
            beside.append(gang())
            points.writer.wait()
    milliseconds = {
        "a gang alone": 1e3 * median(alone),
        "the copy, for which it waits": 1e3 * median(points.copying),
        "a gang while one is written": 1e3 * median(beside),
        "write, sync, hash": 1e3 * median(points.writing),
    }
    report = {
        "benchmark": "recovery",
        "machine": chosen.describe(),
        "base": {"name": base.name, "dtype": dtype},
        "settings": {"gangs": options.gangs, "rows": ROWS, "row_tokens": ROW_TOKENS, "adapter_bytes": run.bytes},
        "milliseconds": milliseconds,
        "beside_over_alone": milliseconds["a gang while one is written"] / milliseconds["a gang alone"],
    }
    console.print(_table(report), highlight=False)
    write_json(report, options.json)
    return 0


def _row(number: int) -> Row:
    tokens = np.random.default_rng(number).integers(5, 250, ROW_TOKENS)
    targets = np.arange(ROW_TOKENS // 2, ROW_TOKENS)
    return Row(tokens, targets, np.full(len(targets), 1 / (ROWS * len(targets))))


def _table(report: dict[str, Any]) -> Table:
    base, settings = report["base"], report["settings"]
    table = Table(
        title=f"A recovery point of {settings['adapter_bytes'] / 2**20:.1f} MiB on {base['name']} in {base['dtype']}",
        caption=f"medians of {settings['gangs']} gangs of {ROWS} x {ROW_TOKENS} tokens",
    )
    table.add_column("", no_wrap=True)
    table.add_column("milliseconds", justify="right")
    for name, value in report["milliseconds"].items():
        table.add_row(name, f"{value:.1f}")
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks recovery", description=__doc__)
    parser.add_argument("--base", default=sources.DEFAULT, help="a hub name, a folder or a GGUF file")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--gangs", type=int, default=10, help="of each kind (10)")
    parser.add_argument("--dir", type=Path, help="a folder on the disk that is meant; else the system's temporary one")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    return parser
