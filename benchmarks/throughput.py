"""Real tokens a second of several jobs on one base: ours, HF PEFT, and the limit that no trainer can pass.

All contenders are measured in one run, in turn, on the same token lists: only ratios of one run count.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.contenders import CONTENDERS, DROPOUT, LORA, MIXLORA, Bases, Contender
from benchmarks.data import Step, all_rows, make_steps, num_tokens
from benchmarks.errors import BenchmarkError
from engine import sources
from engine.errors import EngineError
from engine.probe import choose_device, choose_dtype, probe
from engine.segments import MAX_PACKED_TOKENS

RATIOS = {
    "mixlora_over_limit": ("mixlora", "limit"),
    "mixlora_over_peft": ("mixlora", "peft"),
    "mixlora_over_lora": ("mixlora", "lora"),
    "lora_over_limit": ("lora", "limit"),
    "lora_over_peft": ("lora", "peft"),
    "packing_gain": ("mixlora", "mixlora_one_job_a_pass"),
}
LIMITS = ("limit_packed", "limit_transformers")


def main(arguments: list[str]) -> int:
    """Measure, print the table and write the JSON; the exit code."""
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        report = measure(options, say=console.log)
    except (BenchmarkError, EngineError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    _show(report, console)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def measure(options: argparse.Namespace, say: Any) -> dict[str, Any]:
    """The whole report, as it is written to JSON; `say` is told how far it is.

    Raises:
        BenchmarkError, EngineError: for what the options ask for.
    """
    device = choose_device("auto")
    probed = probe(device)
    dtype = choose_dtype(probed, device) if options.dtype == "auto" else options.dtype
    bases = Bases(sources.resolve(options.base), dtype, device, options.jobs)
    rows = options.rows or options.jobs * options.batch
    steps = make_steps(bases.packed, bases.folder, options.data, jobs=options.jobs, batch=options.batch, rows=rows)
    longest = max(num_tokens([step]) for step in steps)
    if longest > MAX_PACKED_TOKENS:
        raise BenchmarkError(
            f"A step of all jobs has {longest} tokens, a pass takes {MAX_PACKED_TOKENS}; lower --jobs or --batch."
        )
    memory = {name: _peak_in_child(name, bases, steps, say) for name in CONTENDERS}
    contenders = {name: build(bases) for name, build in CONTENDERS.items()}
    seconds = _alternate(contenders, steps, options.rounds, device, say)
    speeds = {name: num_tokens(steps) / median(turns) for name, turns in seconds.items()}
    speeds["limit"] = max(speeds[name] for name in LIMITS)
    return {
        "benchmark": "throughput",
        "machine": machine.describe(device) | {"gigaflops": probed},
        "settings": _settings(options, dtype, steps),
        "tokens_per_second": speeds,
        "ratios": {name: speeds[over] / speeds[under] for name, (over, under) in RATIOS.items()},
        "memory": {"peak_bytes": memory},
        "trainable_parameters": {name: c.trainable_parameters for name, c in contenders.items()},
        "seconds": seconds,
    }


def _alternate(
    contenders: dict[str, Contender], steps: Sequence[Step], rounds: int, device: str, say: Any
) -> dict[str, list[float]]:
    """Seconds of each contender for all steps, once a round, after one step each that does not count."""
    for name, contender in contenders.items():
        say(f"warm-up: {name}")
        contender.step(steps[0])
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(1, rounds + 1):
        for name, contender in contenders.items():
            machine.settle()
            machine.synchronize(device)
            start = time.perf_counter()
            for step in steps:
                contender.step(step)
            machine.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
            say(f"round {number} of {rounds}: {name} {num_tokens(steps) / seconds[name][-1]:.0f} tokens/s")
    return seconds


def _peak_in_child(name: str, bases: Bases, steps: Sequence[Step], say: Any) -> int:
    """Peak memory of one contender alone, over one step: in a fresh process, since a peak never falls."""
    say(f"memory: {name}")
    fresh = Bases(bases.folder, bases.dtype, bases.device, bases.jobs)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_peak, name, fresh, max(steps, key=lambda step: num_tokens([step]))).result()


def _peak(name: str, bases: Bases, step: Step) -> int:
    CONTENDERS[name](bases).step(step)
    machine.synchronize(bases.device)
    return machine.peak_bytes(bases.device)


def _settings(options: argparse.Namespace, dtype: str, steps: Sequence[Step]) -> dict[str, Any]:
    rows = all_rows(steps)
    padded = sum(max(len(row.tokens) for row in batch) * len(batch) for step in steps for batch in step)
    return {
        "base": options.base if options.base == sources.DEFAULT else Path(options.base).name,
        "dtype": dtype,
        "jobs": options.jobs,
        "batch": options.batch,
        "rounds": options.rounds,
        "data": [file.name for file in options.data] or "generated: the demo's tasks",
        "rows": len(rows),
        "tokens": num_tokens(steps),
        "supervised_tokens": sum(len(row.targets) for row in rows),
        "mean_row_tokens": num_tokens(steps) / len(rows),
        "peft_padding": 1 - num_tokens(steps) / padded,
        "optimizer_step": "included for all that train",
        "dropout": DROPOUT,
        "mixlora": MIXLORA,
        "lora": LORA,
    }


def _show(report: dict[str, Any], console: Console) -> None:
    settings, speeds = report["settings"], report["tokens_per_second"]
    about = report["machine"]
    table = Table(title="Real tokens a second (padding never counted; optimizer steps included)")
    for heading in ("contender", "tokens/s", "of the limit", "peak memory", "trainable a job"):
        table.add_column(heading, justify="left" if heading == "contender" else "right")
    for name in CONTENDERS:
        table.add_row(
            name,
            f"{speeds[name]:.1f}",
            f"{speeds[name] / speeds['limit']:.0%}",
            f"{report['memory']['peak_bytes'][name] / 1e9:.2f} GB",
            f"{report['trainable_parameters'][name] / 1e6:.2f} M",
        )
    ratios = Table("ratio", "value")
    for name, ratio in report["ratios"].items():
        ratios.add_row(name, f"{ratio:.2f}")
    console.print(table, ratios)
    console.print(
        f"{settings['base']} in {settings['dtype']}: {settings['jobs']} jobs, batches of {settings['batch']}, "
        f"{settings['rows']} rows of {settings['mean_row_tokens']:.0f} tokens, median of {settings['rounds']} rounds. "
        f"{about['device']} ({about['cpu']}, {about['capability']}, {', '.join(about['flags'])}), {about['threads']} "
        f"threads; torch {about['torch']}, transformers {about['transformers']}, peft {about['peft']}."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks throughput", description=__doc__)
    parser.add_argument("--jobs", type=_positive, default=4, help="Jobs that train side by side.")
    parser.add_argument("--batch", type=_positive, default=8, help="Rows of each job in a step.")
    parser.add_argument("--rows", type=_positive, help="Rows of all jobs together; default: one step of each.")
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="JSONL files, one a job in rotation.")
    parser.add_argument("--base", default=sources.DEFAULT, help="A hub name, a folder or a GGUF file.")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--rounds", type=_positive, default=3, help="Times that each contender is measured.")
    parser.add_argument("--json", type=Path, help="Write the report to this file.")
    return parser


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value
