"""What the engine's work takes beside a token of the frozen base, and what the scheduler charges for it.

By the clock, with all threads, since shares are of the machine's time: what keeps a thread from its work counts. The
least of some repeats: another process makes them longer, never shorter.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
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
from server.store import LocalStore, manifest

RUNS = 8
"""A microbatch of each rides in a gang, and as many sequences are sampled at once."""
SHORT, LONG = 40, 104
"""Tokens of a microbatch in two gangs, whose difference is what a token takes, without what a microbatch takes."""
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
    alone = _of_base(base, watch)
    rows, prices = [], {}
    for name in METHODS:
        measured, of_method = _measure(base, name, watch, alone)
        rows += measured
        prices[name] = vars(of_method)
    report = {
        "benchmark": "costs",
        "machine": chosen.describe(),
        "base": {"name": base.name, "dtype": dtype, "parameters": base.num_parameters},
        "seconds_per_token_equivalent": alone.token,
        "prices": prices,
        "rows": rows,
    }
    console.print(_table(report), highlight=False)
    write_json(report, options.json)
    return 0


class Watch:
    """Seconds that something takes."""

    def __init__(self, device: str, repeats: int):
        self.device = device
        self.repeats = repeats

    def __call__(self, do: Callable[[], object]) -> float:
        seconds = []
        for _ in range(self.repeats + 1):
            began = time.perf_counter()
            do()
            machine.synchronize(self.device)
            seconds.append(time.perf_counter() - began)
        return min(seconds[1:])


@dataclass(frozen=True)
class Gangs:
    """What a gang of short microbatches takes, in seconds, and one of long ones."""

    short: float
    long: float

    @classmethod
    def of(cls, watch: Watch, gang: Callable[[int], object]) -> "Gangs":
        """`gang` has microbatches of so many tokens."""
        return cls(watch(lambda: gang(SHORT)), watch(lambda: gang(LONG)))

    @property
    def token(self) -> float:
        """A token more."""
        return (self.long - self.short) / (RUNS * (LONG - SHORT))

    @property
    def microbatch(self) -> float:
        """One beside its tokens."""
        return self.short / RUNS - SHORT * self.token


def _of_base(base: BaseModel, watch: Watch) -> Gangs:
    """Of the frozen base alone, forward and backward: its token is the unit."""
    limit = PackedLimit(base)
    return Gangs.of(watch, lambda num_tokens: limit.step([[_row(num_tokens)] for _ in range(RUNS)]))


def _measure(base: BaseModel, name: str, watch: Watch, alone: Gangs) -> tuple[list[dict[str, Any]], Prices]:
    """(what each operation of one method takes and costs, in token-equivalents; the prices of its adapter)."""
    config = AdapterConfig.from_dict(
        {"dropout": DROPOUT, "target_modules": target_modules(base.model), **METHODS[name]}
    )
    engine = Engine(base)
    runs = [engine.create_run(config, seed) for seed in range(RUNS)]
    run, prices = runs[0], prices_of(base, runs[0].adapter)

    def gang(num_tokens: int) -> list[Microbatch]:
        return [Microbatch(rows=[_row(num_tokens)], run=one) for one in runs]

    trained = Gangs.of(watch, lambda num_tokens: engine.forward_backward(gang(num_tokens)))
    evaluated = Gangs.of(watch, lambda num_tokens: engine.forward(gang(num_tokens)))
    seconds = {
        "a token trained": trained.token,
        "a token evaluated": evaluated.token,
        "a microbatch trained": trained.microbatch - alone.microbatch,
        "a microbatch evaluated": evaluated.microbatch - alone.microbatch / 2,
        "an optimizer step": watch(lambda: engine.optim_step(run, learning_rate=1e-4)),
        "a checkpoint": _save(base, run, watch),
        "a token sampled": _sample(base, runs[:1], watch),
        f"a token sampled, {RUNS} at once": _sample(base, runs, watch),
    }
    costs = _costs(prices)
    rows = [
        {
            "method": name,
            "operation": operation,
            "takes": seconds[operation] / alone.token,
            "costs": costs[operation],
            "takes_over_costs": seconds[operation] / alone.token / costs[operation],
        }
        for operation in seconds
    ]
    return rows, prices


def _costs(prices: Prices) -> dict[str, float]:
    """Prices without their rounding up."""
    many = 10_000
    trained, evaluated = prices.forward_backward(0), prices.forward(0)
    return {
        "a token trained": (prices.forward_backward(many) - trained) / many,
        "a token evaluated": (prices.forward(many) - evaluated) / many,
        "a microbatch trained": trained,
        "a microbatch evaluated": evaluated,
        "an optimizer step": prices.optim_step(),
        "a checkpoint": prices.save(),
        "a token sampled": prices.sample(many, num_sequences=1) / many,
        f"a token sampled, {RUNS} at once": prices.sample(many, num_sequences=RUNS) / many,
    }


def _save(base: BaseModel, run: Run, watch: Watch) -> float:
    """Writing an adapter as the daemon publishes it: all wait for the copy, and one thread writes that."""
    config = formats.disk_config(run.adapter.config, base_name=base.name, activation=base.activation_name)
    copy = run.adapter.copy()
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(Path(folder))

        def write() -> None:
            manifest(store.put("adapter", lambda place: formats.write(formats.tensors(copy), config, place, "card")))
            store.delete("adapter")

        return watch(run.adapter.copy) + watch(write) / torch.get_num_threads()


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
        caption=f"one is {1e3 * report['seconds_per_token_equivalent']:.2f} ms",
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
