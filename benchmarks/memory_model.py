"""What the memory model predicts against what passes take, for shapes drawn at random; the worst error.

Draws: method lora, dora, mixlora, mixdora; rank 1 to 64; 2 to 8 experts, 1 to 3 active; any targets, with one in the
feed-forward for mixtures; dropout 0, 0.05 or 0.1; 1 to 4 jobs a pass, each with one or two microbatches of 128 to 512
tokens, in rows of 16 to 128; float32 and bfloat16. A small random base stands for all: what a token takes depends on
shapes alone. Measured is what the allocators were asked for, torch's by its profiler and numpy's by `tracemalloc`.
"""

import argparse
import math
import random
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.machine import describe
from benchmarks.reports import write_json
from engine.base_model import BaseModel
from engine.config import AdapterConfig
from engine.engine import Engine
from engine.lanes import Riders
from engine.memory import allocations, measure
from engine.run import Microbatch, Row
from server.daemon.publish import base_row
from server.db.tables import Base
from server.memory import Part, pass_bytes, resident_bytes
from server.resolve import ATTENTION, FEED_FORWARD, TRAINING_BYTES_PER_PARAMETER, num_parameters

T = TypeVar("T")
TARGETS = (*ATTENTION, *FEED_FORWARD)
ROWS = (16, 32, 64, 128)
USUAL = AdapterConfig(
    method="mixlora",
    rank=1,
    alpha=2,
    dropout=0.1,
    target_modules=TARGETS,
    num_experts=2,
    top_k=1,
    router_aux_loss_coef=0.01,
)
MOST_ERROR = 0.15


class OnePass(Engine):
    """Whose gangs are a pass each, which is what the model is of."""

    def __init__(self, base: BaseModel):
        super().__init__(base)
        for targets in (TARGETS, FEED_FORWARD[1:]):  # compiles the loops of both ways, which takes memory of its own
            run = self.create_run(replace(USUAL, target_modules=targets), 0)
            self.forward_backward([Microbatch(rows=[_row(ROWS[0])], run=run)])

    def in_passes(
        self, sizes: Sequence[int], work: Callable[[Riders], T], **_of_kinds: object
    ) -> list[tuple[Riders, T]]:
        everybody = list(range(len(sizes)))
        return [(everybody, work(everybody))]


def draw_adapter(draw: random.Random) -> AdapterConfig:
    """Any config that a job may have, within the ranges above."""
    mixture: dict[str, Any] = {}
    targets = draw.sample(TARGETS, draw.randint(1, len(TARGETS)))
    if draw.random() < 0.6:
        num_experts = draw.randint(2, 8)
        mixture = {
            "num_experts": num_experts,
            "top_k": draw.randint(1, min(3, num_experts)),
            "router_aux_loss_coef": 0.01,
        }
        if not set(targets) & set(FEED_FORWARD):
            targets.append(draw.choice(FEED_FORWARD))
    rank = 2 ** draw.randint(0, 6)
    return AdapterConfig(
        method="mixlora" if mixture else "lora",
        rank=rank,
        alpha=2 * rank,
        dropout=draw.choice((0.0, 0.05, 0.1)),
        dora=draw.random() < 0.4,
        target_modules=tuple(target for target in TARGETS if target in targets),
        **mixture,
    )


def draw_pass(draw: random.Random, most_jobs: int = 4) -> list[tuple[AdapterConfig, list[list[int]]]]:
    """Of each job its adapter and its microbatches: lengths of rows."""
    parts = []
    for _ in range(draw.randint(1, most_jobs)):
        length = draw.choice(ROWS)
        microbatches = [[length] * (draw.choice((128, 256, 512)) // length) for _ in range(draw.choice((1, 1, 2)))]
        parts.append((draw_adapter(draw), microbatches))
    return parts


def measured(engine: OnePass, parts: list[tuple[AdapterConfig, list[list[int]]]]) -> int:
    """The most that a pass allocates: torch's bytes, and numpy's, which hold what dropout drew."""
    microbatches = []
    for number, (config, lengths) in enumerate(parts):
        run = engine.create_run(config, number)
        microbatches += [Microbatch(rows=[_row(length) for length in rows], run=run) for rows in lengths]
    of_numpy = 0

    def work() -> None:
        nonlocal of_numpy
        tracemalloc.start()
        engine.forward_backward(microbatches)
        of_numpy = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

    return allocations(work, engine.base.device).peak + of_numpy


def predicted(base: Base, parts: list[tuple[AdapterConfig, list[list[int]]]]) -> int:
    """The same by arithmetic: the pass, and the copies of the weights in the base's dtype."""
    adapters = [config.as_dict() for config, _ in parts]
    copies = sum(
        resident_bytes(adapter, base) - TRAINING_BYTES_PER_PARAMETER * num_parameters(adapter, base)
        for adapter in adapters
    )
    sizes = [[sum(rows) for rows in lengths] for _, lengths in parts]
    return copies + pass_bytes([Part(adapter=a, microbatches=s) for a, s in zip(adapters, sizes, strict=True)], base)


def published(base: BaseModel) -> Base:
    """The base as a daemon tells the API of it."""
    return base_row(base, source=Path(), tokenizer={}, probed={}, memory=measure(base))


def small_base(dtype: torch.dtype, *, recompute: bool) -> BaseModel:
    """Six layers and a small vocabulary, so that neither the head nor one block of experts makes the peak."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=512,
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    return BaseModel(model, name="small", hash_="small", recompute=recompute)


def main(arguments: list[str]) -> int:
    """Draw, predict, measure; 1 where an error is above 15 %."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    draw = random.Random(options.seed)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        base = small_base(dtype, recompute=options.recompute)
        engine, row = OnePass(base), published(base)
        for _ in range(options.passes):
            parts = draw_pass(draw)
            said, was = predicted(row, parts), measured(engine, parts)
            rows.append(_report(dtype, parts, said, was))
    worst = max(abs(row["error"]) for row in rows)
    console = Console()
    console.print(_table(rows), highlight=False)
    console.print(f"seed {options.seed}: the worst of {len(rows)} errors is {worst:.1%}", highlight=False)
    write_json({"machine": describe("cpu"), "seed": options.seed, "worst_error": worst, "rows": rows}, options.json)
    return int(worst > MOST_ERROR)


def _row(length: int) -> Row:
    return Row(np.arange(length) % 200, np.arange(1, length), np.full(length - 1, 0.01))


def _report(
    dtype: torch.dtype, parts: list[tuple[AdapterConfig, list[list[int]]]], said: int, was: int
) -> dict[str, Any]:
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "jobs": [{**config.as_dict(), "microbatches": [sum(rows) for rows in lengths]} for config, lengths in parts],
        "predicted_bytes": said,
        "measured_bytes": was,
        "error": said / was - 1,
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("dtype", "jobs", "tokens", "predicted MiB", "measured MiB", "error")
    for row in rows:
        jobs = ", ".join(f"{'dora ' if job['dora'] else ''}{job['method']} r={job['rank']}" for job in row["jobs"])
        tokens = math.fsum(sum(job["microbatches"]) for job in row["jobs"])
        sizes = (f"{row[name] / 2**20:.1f}" for name in ("predicted_bytes", "measured_bytes"))
        table.add_row(row["dtype"], jobs, f"{tokens:.0f}", *sizes, f"{row['error']:+.1%}")
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory_model", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the shapes (0)")
    parser.add_argument("--passes", type=int, default=12, help="of each dtype (12)")
    parser.add_argument("--recompute", action="store_true", help="as the setting of that name")
    parser.add_argument("--json", type=Path, help="write the report there")
    return parser
