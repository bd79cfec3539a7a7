"""What the engine's work takes beside a token of the frozen base, and what the scheduler charges for it.

Seconds are those of all threads together, the least of some repeats: another process makes them longer, never shorter.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.bases import DROPOUT, MIXLORA, target_modules
from benchmarks.contenders import PackedLimit
from benchmarks.reports import write_json
from engine import base_model, formats, sources
from engine.base_model import BaseModel
from engine.config import AdapterConfig
from engine.engine import Engine
from engine.run import Microbatch, Row, Run
from engine.sampling import Sample, advance
from scheduler.cost import Prices
from server.daemon.prices import prices_of
from server.store import LocalStore

SHORT = 16
"""Tokens of the rows of tiny microbatches."""
FEW, MANY = 320, 960
"""Tokens of two passes whose difference is what a token takes, without what every pass takes."""
SAMPLED = 8
METHODS = {
    "lora": {"method": "lora", "rank": 16, "alpha": 32.0},
    "mixlora": {"method": "mixlora", **MIXLORA},
}


def main(arguments: list[str]) -> int:
    """Measure, print the table and write the JSON; the exit code."""
    options = _parser().parse_args(arguments)
    console = Console()
    chosen = machine.choose(options.dtype)
    device, dtype = chosen.device, chosen.dtype
    base = base_model.load(
        sources.resolve(options.base), name=Path(options.base).name, dtype=getattr(torch, dtype), device=device
    )
    watch = Watch(device, options.repeats)
    token = _base_token(base, watch)
    rows, prices = [], {}
    for name in METHODS:
        measured, of_method = _measure(base, name, watch, token)
        rows += measured
        prices[name] = vars(of_method)
    report = {
        "benchmark": "costs",
        "machine": chosen.describe(),
        "base": {"name": base.name, "dtype": dtype, "parameters": base.num_parameters},
        "seconds_per_token_equivalent": token,
        "prices": prices,
        "rows": rows,
    }
    console.print(_table(report), highlight=False)
    write_json(report, options.json)
    return 0


class Watch:
    """Seconds that something takes: of the processor on a CPU, of the clock on a GPU."""

    def __init__(self, device: str, repeats: int):
        self.device = device
        self.repeats = repeats
        self.clock = time.perf_counter if device == "cuda" else time.process_time

    def __call__(self, do: Callable[[], object], *, clock: Callable[[], float] | None = None) -> float:
        clock = clock or self.clock
        seconds = []
        for _ in range(self.repeats + 1):
            began = clock()
            do()
            machine.synchronize(self.device)
            seconds.append(clock() - began)
        return min(seconds[1:])


def _base_token(base: BaseModel, watch: Watch) -> float:
    """Seconds of a token-equivalent: a token more in a pass of the frozen base alone, forward and backward."""
    limit = PackedLimit(base)
    few, many = ([[_row(count)]] for count in (FEW, MANY))
    return (watch(lambda: limit.step(many)) - watch(lambda: limit.step(few))) / (MANY - FEW)


def _measure(base: BaseModel, name: str, watch: Watch, token: float) -> tuple[list[dict[str, Any]], Prices]:
    """(what each operation of one method takes and costs, in token-equivalents; the prices of its adapter)."""
    config = AdapterConfig.from_dict(
        {"dropout": DROPOUT, "target_modules": target_modules(base.model), **METHODS[name]}
    )
    engine = Engine(base)
    runs = [engine.create_run(config, seed) for seed in range(SAMPLED)]
    run, prices = runs[0], prices_of(base, runs[0].adapter)
    few, many = ([Microbatch(rows=[_row(count)], run=run)] for count in (FEW, MANY))
    apart = [Microbatch(rows=[_row(SHORT)], run=one) for one in runs]
    together = [Microbatch(rows=[_row(SHORT) for _ in runs], run=run)]
    trained = watch(lambda: engine.forward_backward(many)) - watch(lambda: engine.forward_backward(few))
    evaluated = watch(lambda: engine.forward(many)) - watch(lambda: engine.forward(few))
    microbatch = (watch(lambda: engine.forward_backward(apart)) - watch(lambda: engine.forward_backward(together))) / (
        len(runs) - 1
    )
    seconds = {
        "a token trained": trained / (MANY - FEW),
        "a token evaluated": evaluated / (MANY - FEW),
        "a microbatch": microbatch,
        "an optimizer step": watch(lambda: engine.optim_step(run, learning_rate=1e-4)),
        "a checkpoint": _save(base, run, watch),
        "a token sampled": _sample(base, runs[:1], watch),
        f"a token sampled, {SAMPLED} at once": _sample(base, runs, watch),
    }
    costs = _costs(prices)
    rows = [
        {
            "method": name,
            "operation": operation,
            "takes": seconds[operation] / token,
            "costs": costs[operation],
            "takes_over_costs": seconds[operation] / token / costs[operation],
        }
        for operation in seconds
    ]
    return rows, prices


def _costs(prices: Prices) -> dict[str, float]:
    """Prices without their rounding up."""
    many = 10_000
    microbatch = prices.forward_backward(0)
    return {
        "a token trained": (prices.forward_backward(many) - microbatch) / many,
        "a token evaluated": (prices.forward(many) - prices.forward(0)) / many,
        "a microbatch": microbatch,
        "an optimizer step": prices.optim_step(),
        "a checkpoint": prices.save(),
        "a token sampled": prices.sample(many, num_sequences=1) / many,
        f"a token sampled, {SAMPLED} at once": prices.sample(many, num_sequences=SAMPLED) / many,
    }


def _save(base: BaseModel, run: Run, watch: Watch) -> float:
    """Writing an adapter as the daemon publishes it. By the clock: the disk takes no processor's time."""
    tensors = formats.tensors(run.adapter)
    config = formats.disk_config(run.adapter.config, base_name=base.name, activation=base.activation_name)
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(Path(folder))

        def save() -> None:
            store.put("adapter", lambda place: formats.write(tensors, config, place, "card"))
            store.delete("adapter")

        return watch(save, clock=time.perf_counter)


def _sample(base: BaseModel, runs: list[Run], watch: Watch) -> float:
    """A token of each sequence more; the prompt is not in it. One adapter for all, as of one tenant's requests."""

    def draw(num_tokens: int) -> None:
        adapter = runs[0].adapter
        samples = [Sample(prompt=list(range(10, 26)), max_tokens=64, adapter=adapter) for _ in runs]
        advance(base, samples, num_tokens)

    return (watch(lambda: draw(9)) - watch(lambda: draw(1))) / 8 / len(runs)


def _row(num_tokens: int) -> Row:
    """A row whose second half is supervised."""
    targets = np.arange(num_tokens // 2, num_tokens)
    tokens = np.random.default_rng(num_tokens).integers(5, 250, num_tokens)
    return Row(tokens, targets, np.full(len(targets), 1 / len(targets)))


def _table(report: dict[str, Any]) -> Table:
    base = report["base"]
    table = Table(
        title=f"In token-equivalents of {base['name']} in {base['dtype']}",
        caption=f"one is {1e3 * report['seconds_per_token_equivalent']:.2f} ms of all threads",
    )
    for heading in ("method", "operation", "takes", "costs", "takes / costs"):
        table.add_column(heading, justify="left" if heading in ("method", "operation") else "right", no_wrap=True)
    for row in report["rows"]:
        numbers = (f"{row[name]:.2f}" for name in ("takes", "costs", "takes_over_costs"))
        table.add_row(row["method"], row["operation"], *numbers)
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks costs", description=__doc__)
    parser.add_argument("--base", default=sources.DEFAULT, help="a hub name, a folder or a GGUF file")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--repeats", type=int, default=3, help="of which the fastest counts (3)")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    return parser
