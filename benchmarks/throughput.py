"""Real tokens a second of several jobs on one base: ours, HF PEFT, and the limit that no trainer can pass.

All contenders are measured in one run, in turn, on the same token lists: only ratios of one run count.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine, moe_peft_contender
from benchmarks.apart import Apart
from benchmarks.bases import DROPOUT, METHODS, Bases
from benchmarks.contenders import CONTENDERS, STEPS_TO_PEAK, Alone, alone, require_same_loss
from benchmarks.data import Step, all_rows, make_steps, num_tokens
from benchmarks.errors import BenchmarkError
from benchmarks.reports import command, positive
from engine import sources
from engine.segments import MAX_PACKED_TOKENS

LIMITS = ("limit_packed", "limit_transformers")
APART = ("limit_transformers", "peft")
"""Those of others, on a CPU; MoE-PEFT has its own process anyway."""
RATIOS = {
    "mixlora_over_limit": ("mixlora", "limit"),
    "mixlora_over_peft": ("mixlora", "peft"),
    "mixlora_over_moe_peft": ("mixlora", "moe_peft"),
    "mixlora_over_lora": ("mixlora", "lora"),
    "dora_over_lora": ("dora", "lora"),
    "mixdora_over_lora": ("mixdora", "lora"),
    "lora_over_limit": ("lora", "limit"),
    "lora_over_peft": ("lora", "peft"),
    "packing_gain": ("mixlora", "mixlora_one_job_a_pass"),
}
"""Of speeds; those of contenders that take part are reported."""


@dataclass(frozen=True)
class Turn:
    """One contender's way through all steps."""

    seconds: float
    cpu_seconds: float
    """Of all threads: near seconds x threads where nothing else ran on the machine."""


def main(arguments: list[str]) -> int:
    """Measure, print the table and write the JSON; the exit code."""
    options = _parser().parse_args(arguments)
    return command(options, measure, _show)


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The whole report, as it is written to JSON.

    Raises:
        BenchmarkError, EngineError: for what the options ask for.
    """
    chosen = machine.choose(options.dtype)
    device, dtype = chosen.device, chosen.dtype
    if options.moe_peft and device == "cuda":
        raise BenchmarkError("--moe-peft is measured on a CPU only.")
    others = moe_peft_contender.versions(options.moe_peft) if options.moe_peft else {}
    folder, jobs_a_pass = sources.resolve(options.base), options.jobs_a_pass or options.jobs
    bases = Bases(folder, dtype, device, options.jobs, jobs_a_pass, options.moe_peft)
    steps = _steps(options, bases)
    names = taking_part(options.methods, moe_peft=options.moe_peft is not None)
    each = _each_alone(names, bases, max(steps, key=lambda step: num_tokens([step])), console)
    turns = _alternate(names, bases, steps, options.rounds, console)
    seconds = {name: [turn.seconds for turn in turns[name]] for name in names}
    speeds = _speeds({name: median(seconds[name]) for name in names}, num_tokens(steps))
    rounds = [dict(zip(seconds, of_round, strict=True)) for of_round in zip(*seconds.values(), strict=True)]
    return {
        "benchmark": "throughput",
        "machine": chosen.describe(),
        "settings": _settings(options, dtype, steps) | {"moe_peft": others},
        "tokens_per_second": speeds,
        "ratios": _ratios(speeds),
        "ratios_of_rounds": [_ratios(_speeds(of_round, num_tokens(steps))) for of_round in rounds],
        "memory": {"peak_bytes": {name: mine.peak_bytes for name, mine in each.items()}},
        "trainable_parameters": {name: mine.trainable_parameters for name, mine in each.items()},
        "first_loss": {name: mine.loss for name, mine in each.items()},
        "turns": {name: [asdict(turn) for turn in turns[name]] for name in names},
    }


def _speeds(seconds: dict[str, float], tokens: int) -> dict[str, float]:
    """Tokens a second of each contender, and of the faster limit."""
    speeds = {name: tokens / taken for name, taken in seconds.items()}
    return speeds | {"limit": max(speeds[name] for name in LIMITS)}


def _ratios(speeds: dict[str, float]) -> dict[str, float]:
    return {
        name: speeds[over] / speeds[under] for name, (over, under) in RATIOS.items() if {over, under} <= speeds.keys()
    }


def taking_part(methods: Sequence[str], *, moe_peft: bool) -> list[str]:
    """The contenders of a run, in the order of their turns."""
    chosen = {*LIMITS, *methods, "peft"}
    if "mixlora" in methods:
        chosen.add("mixlora_one_job_a_pass")
    if moe_peft:
        chosen.add("moe_peft")
    return [name for name in CONTENDERS if name in chosen]


def _steps(options: argparse.Namespace, bases: Bases) -> list[Step]:
    step_rows = options.jobs * options.batch
    rows = step_rows * max(1, -(-(options.rows or 1) // step_rows))  # whole steps
    steps = make_steps(bases.packed, bases.folder, options.data, jobs=options.jobs, batch=options.batch, rows=rows)
    longest = max(num_tokens([step]) for step in steps)
    if longest > MAX_PACKED_TOKENS:
        raise BenchmarkError(
            f"A step of all jobs has {longest} tokens, a pass takes {MAX_PACKED_TOKENS}; lower --jobs or --batch."
        )
    return steps


def _each_alone(names: Sequence[str], bases: Bases, step: Step, console: Console) -> dict[str, Alone]:
    """Every contender's first steps, each in a fresh process.

    Raises:
        BenchmarkError: they do not all start from the same loss, so they do not do the same work.
    """
    each = {}
    processes = machine.fresh_processes(bases.device, preload="benchmarks.contenders")
    for name in names:
        with ProcessPoolExecutor(1, mp_context=processes) as pool:
            mine = each[name] = pool.submit(alone, name, replace(bases), step).result()
        console.print(f"{name}: first loss {mine.loss:.4f}, peak {mine.peak_bytes / 1e9:.2f} GB", highlight=False)
    require_same_loss([mine.loss for mine in each.values()], bases.dtype)
    return each


def _alternate(
    names: Sequence[str], bases: Bases, steps: Sequence[Step], rounds: int, console: Console
) -> dict[str, list[Turn]]:
    """Each contender's turns, one a round, after one step each that does not count."""
    contenders = {
        name: Apart(name, bases) if name in APART and bases.device == "cpu" else CONTENDERS[name](bases)
        for name in names
    }
    for contender in contenders.values():
        contender.step(steps[0])
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    for number in range(1, rounds + 1):
        for name, contender in contenders.items():
            turn = _turn(contender.step, steps, bases.device)
            turns[name].append(turn)
            speed = num_tokens(steps) / turn.seconds
            console.print(f"round {number} of {rounds}, {name}: {speed:.1f} tokens/s", highlight=False)
    return turns


def _turn(do: Callable[[Step], float], steps: Sequence[Step], device: str) -> Turn:
    machine.synchronize(device)
    start, cpu_start = time.perf_counter(), machine.cpu_seconds()
    for step in steps:
        do(step)
    machine.synchronize(device)
    return Turn(time.perf_counter() - start, machine.cpu_seconds() - cpu_start)


def _settings(options: argparse.Namespace, dtype: str, steps: Sequence[Step]) -> dict[str, Any]:
    rows = all_rows(steps)
    padded = sum(max(len(row.tokens) for row in batch) * len(batch) for step in steps for batch in step)
    return {
        "base": Path(options.base).name,
        "dtype": dtype,
        "jobs": options.jobs,
        "jobs_a_pass": options.jobs_a_pass or options.jobs,
        "batch": options.batch,
        "rounds": options.rounds,
        "steps_to_peak": STEPS_TO_PEAK,
        "data": [file.name for file in options.data] or "generated from the demo's tasks",
        "rows": len(rows),
        "tokens": num_tokens(steps),
        "supervised_tokens": sum(len(row.targets) for row in rows),
        "peft_padding": 1 - num_tokens(steps) / padded,
        "optimizer_step": "included for all that train",
        "dropout": DROPOUT,
        "methods": {name: METHODS[name] for name in options.methods},
    }


def _show(report: dict[str, Any], console: Console) -> None:
    speeds, about = report["tokens_per_second"], report["machine"]
    table = Table(
        title="Real tokens a second: padding never counted, optimizer steps included",
        caption="cores: how many were busy. params: those that a job trains.",
    )
    for heading in ("contender", "tokens/s", "of limit", "cores", "peak GB", "params M"):
        table.add_column(heading, justify="left" if heading == "contender" else "right", no_wrap=True)
    for name, turns in report["turns"].items():
        busy = sum(turn["cpu_seconds"] for turn in turns) / sum(turn["seconds"] for turn in turns)
        table.add_row(
            name,
            f"{speeds[name]:.1f}",
            f"{speeds[name] / speeds['limit']:.0%}",
            f"{busy:.1f}",
            f"{report['memory']['peak_bytes'][name] / 1e9:.2f}",
            f"{report['trainable_parameters'][name] / 1e6:.2f}",
        )
    ratios = Table("ratio", "of medians", "median of rounds", "least", "most")
    for name, ratio in report["ratios"].items():
        of_rounds = [each[name] for each in report["ratios_of_rounds"]]
        ratios.add_row(name, *(f"{value:.2f}" for value in (ratio, median(of_rounds), min(of_rounds), max(of_rounds))))
    console.print(table, ratios)
    console.print(_circumstances(report["settings"], about), highlight=False)


def _circumstances(settings: dict[str, Any], about: dict[str, Any]) -> str:
    """All that a figure must be quoted with."""
    row_tokens = settings["tokens"] / settings["rows"]
    return (
        f"{settings['base']} in {settings['dtype']}; {settings['jobs']} jobs, of ours {settings['jobs_a_pass']} in a "
        f"gang, batches of {settings['batch']}, {settings['rows']} rows of {row_tokens:.0f} tokens "
        f"({settings['peft_padding']:.0%} of what PEFT computes is "
        f"padding); median of {settings['rounds']} rounds. {about['device']}: {about['cpu']}, {about['capability']}, "
        f"{' '.join(about['flags'])}, {about['threads']} threads; torch {about['torch']}, transformers "
        f"{about['transformers']}, peft {about['peft']}."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks throughput", description=__doc__)
    parser.add_argument("--jobs", type=positive, default=4, help="jobs that train side by side (4)")
    parser.add_argument("--jobs-a-pass", type=positive, help="of our engine; fewer take less memory (all)")
    parser.add_argument("--batch", type=positive, default=8, help="rows of each job in a step (8)")
    parser.add_argument(
        "--methods", choices=METHODS, nargs="+", default=["lora", "mixlora"], help="of ours (lora mixlora)"
    )
    parser.add_argument("--rows", type=positive, help="rows of all jobs together, rounded up to whole steps (one step)")
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="JSONL files, one a job in rotation")
    parser.add_argument(
        "--moe-peft", type=Path, help="the Python of an environment with MoE-PEFT, which then takes part"
    )
    parser.add_argument("--base", default=sources.DEFAULT, help="a hub name, a folder or a GGUF file")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--rounds", type=positive, default=3, help="times that each contender is measured (3)")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    return parser
