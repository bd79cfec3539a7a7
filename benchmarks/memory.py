"""Peak memory of 1 to 16 jobs resident on one base, and of as many HF PEFT processes, on the same rows.

Each figure is a fresh process's peak of resident memory (on CUDA of the GPU's) in the first steps of every job. Ours
holds all jobs and trains them four in a gang, as many gangs whatever the number of jobs. PEFT has a process a job: one
is measured, and the others are reckoned to take as much, but for what each takes before it loads a model.
"""

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.bases import METHODS, Bases
from benchmarks.contenders import alone
from benchmarks.data import cut_rows
from benchmarks.reports import Report, command, positive
from engine import sources

T = TypeVar("T")
JOBS = (1, 2, 4, 8, 16)
JOBS_A_PASS = 4
GANGS = 8
"""That each count of jobs trains in all: the heap grows a little from gang to gang until all has found its place there,
whoever rides."""
TRAINING_BYTES_PER_PARAMETER = 16
BASE_SHARE = 0.01
"""What one more resident job may take: 16 bytes a parameter that it trains, and this share of the base."""


def main(arguments: list[str]) -> int:
    """Measure, print the table and write the JSON; the exit code."""
    return command(_parser().parse_args(arguments), measure, _show)


def measure(options: argparse.Namespace, console: Console) -> Report:
    """The whole report, as it is written to JSON."""
    chosen = machine.choose(options.dtype)
    bases = Bases(sources.resolve(options.base), chosen.dtype, chosen.device, max(options.jobs), JOBS_A_PASS)
    # All jobs alike: that one gang is larger than another says nothing of a job that is resident.
    step = cut_rows(bases.packed, bases.folder, jobs=bases.jobs, rows=options.batch, tokens=options.tokens)
    bare = _in_fresh_process(bases.device, _bytes_of_nothing, bases.device)
    peft = _in_fresh_process(bases.device, alone, "peft", replace(bases), step[:1]).peak_bytes
    peaks: dict[str, list[int]] = {"peft": [bare + jobs * (peft - bare) for jobs in options.jobs]}
    parameters = {}
    for method in options.methods:
        peaks[method] = []
        for jobs in options.jobs:
            steps = -(-GANGS // -(-jobs // JOBS_A_PASS))
            ours = _in_fresh_process(bases.device, alone, method, replace(bases, jobs=jobs), step[:jobs], steps)
            peaks[method].append(ours.peak_bytes)
            parameters[method] = ours.trainable_parameters
            console.print(f"{method}, {jobs} jobs: {ours.peak_bytes / 1e9:.2f} GB", highlight=False)
    return {
        "benchmark": "memory",
        "machine": chosen.describe(),
        "settings": {
            "base": Path(options.base).name,
            "dtype": chosen.dtype,
            "jobs": options.jobs,
            "batch": options.batch,
            "tokens": options.tokens,
            "jobs_a_pass": JOBS_A_PASS,
            "gangs": GANGS,
        },
        "base_bytes": sum(parameter.nbytes for parameter in bases.packed.model.parameters()),
        "before_a_model_bytes": bare,
        "peak_bytes": peaks,
        "trainable_parameters": parameters,
        "bytes_of_one_more_job": {method: _slope(options.jobs, peaks[method]) for method in options.methods},
    }


def _in_fresh_process(device: str, work: Callable[..., T], *arguments: Any) -> T:
    processes = machine.fresh_processes(device, preload="benchmarks.contenders")
    with ProcessPoolExecutor(1, mp_context=processes) as pool:
        return pool.submit(work, *arguments).result()


def _bytes_of_nothing(device: str) -> int:
    """What a process takes that has loaded its program and no model."""
    return 0 if device == "cuda" else psutil.Process().memory_info().rss


def _slope(jobs: list[int], peaks: list[int]) -> float | None:
    """From the first count at which passes are full to the last one."""
    full = [(count, peak) for count, peak in zip(jobs, peaks, strict=True) if count >= JOBS_A_PASS]
    if len(full) < 2:
        return None
    return (full[-1][1] - full[0][1]) / (full[-1][0] - full[0][0])


def _show(report: Report, console: Console) -> None:
    settings, about = report["settings"], report["machine"]
    table = Table("jobs", *(f"{name} GB" for name in report["peak_bytes"]), title="Peak memory of all jobs together")
    for index, jobs in enumerate(settings["jobs"]):
        table.add_row(str(jobs), *(f"{peaks[index] / 1e9:.2f}" for peaks in report["peak_bytes"].values()))
    console.print(table)
    for method, more in report["bytes_of_one_more_job"].items():
        if more is not None:
            bound = TRAINING_BYTES_PER_PARAMETER * report["trainable_parameters"][method]
            bound += int(BASE_SHARE * report["base_bytes"])
            console.print(
                f"{method}: one more job takes {more / 1e6:.1f} MB; 16 bytes a parameter and 1 % of the base are "
                f"{bound / 1e6:.1f} MB.",
                highlight=False,
            )
    console.print(
        f"{settings['base']} in {settings['dtype']}; {settings['batch']} rows a job, of {settings['tokens']} tokens; "
        f"{about['device']}: {about['cpu']}, {about['threads']} threads, torch {about['torch']}, peft "
        f"{about['peft']}.",
        highlight=False,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory", description=__doc__)
    parser.add_argument("--jobs", type=positive, nargs="+", default=list(JOBS), help="how many (1 2 4 8 16)")
    parser.add_argument("--batch", type=positive, default=8, help="rows of each job in a step (8)")
    parser.add_argument("--tokens", type=positive, default=50, help="of each row (50)")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=["lora", "mixlora"], help="of ours")
    parser.add_argument("--base", default=sources.DEFAULT, help="a hub name, a folder or a GGUF file")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    return parser
