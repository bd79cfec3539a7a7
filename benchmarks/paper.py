"""The MixLoRA paper's tables 6 and 7 on one's own machine: time a token and memory a model, as ratios to LoRA.

All contenders run on one base, in one run and in turn, on the same token lists. Only ratios of one run count.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.baselines import feed_forwards, looped
from benchmarks.bases import LEARNING_RATE, MAX_GRAD_NORM, METHODS, Bases
from benchmarks.contenders import packed_targets, require_same_loss
from benchmarks.data import Step, make_steps, num_tokens
from benchmarks.errors import BenchmarkError
from benchmarks.published import TABLES, Figures
from benchmarks.reports import Report, command, positive
from engine import sources
from engine.adapter import Weights
from engine.base_model import BaseModel
from engine.dropout import Drops
from engine.engine import Engine
from engine.loss import LOSSES, target_logprobs
from engine.run import Row
from engine.segments import Segment, pack

MODELS = (1, 2)
COLUMNS = tuple(field.name for field in fields(Figures))
REFERENCE = ("lora", 1)


@dataclass(frozen=True)
class Variant:
    label: str
    method: str
    feed_forwards: Callable[[BaseModel], Sequence[nn.Module]] | None = None  # None: our engine's own


VARIANTS = {
    "lora": Variant("LoRA", "lora"),
    "dora": Variant("DoRA", "dora"),
    "mixlora_unshared": Variant("MixLoRA", "mixlora", lambda base: looped(base, shares_projections=False)),
    "mixlora_w1_w3": Variant("MixLoRA, W1 W3 shared", "mixlora", lambda base: looped(base, shares_projections=True)),
    "mixlora_w1_w3_w2": Variant("MixLoRA, W2 too (ours)", "mixlora"),
}
ROWS = [(name, models) for models in MODELS for name in VARIANTS]


@dataclass(frozen=True)
class Turn:
    """Seconds of one pass of each kind."""

    forward: float
    backward: float
    inference: float


@dataclass(frozen=True)
class Alone:
    """What a row comes to in processes of its own: one that trains and one that does not."""

    loss: float
    training_bytes: int
    inference_bytes: int


class Contender:
    """One variant with one or more models, whose rows ride in one pass."""

    def __init__(self, bases: Bases, name: str, models: int):
        variant = VARIANTS[name]
        self.base = bases.packed
        self.engine = Engine(self.base)
        self.runs = bases.runs(variant.method)[:models]
        self.feed_forwards = variant.feed_forwards and variant.feed_forwards(self.base)

    def train(self, step: Step) -> tuple[float, float, float]:
        """(loss of the first model, seconds of the forward, of the backward); then an optimizer step, not timed."""
        step = step[: len(self.runs)]
        began = self._now()
        segments = [
            _segment(
                rows,
                Weights.of(run.adapter, self.base.dtype, run.gradient),
                Drops(key) if (key := run.dropout_key(run.microbatch)) else None,
            )
            for rows, run in zip(step, self.runs, strict=True)
        ]
        with self._forward(segments, step) as (loss, logprobs):
            auxiliary = [term for segment in segments if segment.aux_loss is not None for term in segment.aux_loss]
            forwarded = self._now()
            torch.autograd.backward([loss, *auxiliary])
            ended = self._now()
        for run in self.runs:
            self.engine.optim_step(run, learning_rate=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM)
        first = -float(logprobs[: sum(len(row.targets) for row in step[0])].mean())
        return first, forwarded - began, ended - forwarded

    @torch.no_grad()
    def infer(self, step: Step) -> float:
        """Seconds of a forward without gradient and dropout."""
        step = step[: len(self.runs)]
        began = self._now()
        weights = [Weights.of(run.adapter, self.base.dtype) for run in self.runs]
        with self._forward([_segment(*each) for each in zip(step, weights, strict=True)], step):
            return self._now() - began

    @contextmanager
    def _forward(self, segments: Sequence[Segment], step: Step) -> Iterator[tuple[Tensor, Tensor]]:
        """(loss, log-probs of the targets), within the pass."""
        targets = packed_targets([row for rows in step for row in rows], self.base.device)
        batch = pack(segments, self.base.device)
        with self._in_place(), self.base.pass_.over(batch):
            hidden = self.base.hidden_states(batch)
            yield target_logprobs(hidden, self.base.head, *targets, LOSSES["cross_entropy"])

    def _in_place(self) -> AbstractContextManager[None]:
        return feed_forwards(self.base, self.feed_forwards) if self.feed_forwards else nullcontext()

    def _now(self) -> float:
        machine.synchronize(self.base.device.type)
        return time.perf_counter()


def _segment(rows: list[Row], weights: Weights, dropout: Drops | None = None) -> Segment:
    return Segment([torch.from_numpy(row.tokens) for row in rows], weights, dropout)


def main(arguments: list[str]) -> int:
    """Measure, print the table, write the JSON and draw the chart; the exit code."""
    return command(_parser().parse_args(arguments), _measure_and_draw, _show)


def _measure_and_draw(options: argparse.Namespace, console: Console) -> Report:
    draw = _chart(options.chart)  # says at once what it lacks
    report = measure(options, console)
    draw(report)
    return report


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The whole report, as it is written to JSON.

    Raises:
        BenchmarkError, EngineError: for what the options ask for; the contenders do not do the same work.
    """
    chosen = machine.choose(options.dtype)
    device, dtype = chosen.device, chosen.dtype
    bases = Bases(sources.resolve(options.base), dtype, device, jobs=max(MODELS), jobs_a_pass=max(MODELS))
    (step,) = make_steps(
        bases.packed,
        bases.folder,
        options.data,
        jobs=bases.jobs,
        batch=options.batch,
        rows=bases.jobs * options.batch,
    )
    alone = _alone(bases, step, console)
    turns = _alternate(bases, step, options.rounds, console)
    published = TABLES[options.table]
    measured = {row: _figures(step, row, alone[row], turns[row]) for row in ROWS}
    return {
        "benchmark": "paper",
        "table": options.table,
        "published_base": published.base,
        "machine": chosen.describe(),
        "settings": {
            "base": Path(options.base).name,
            "dtype": dtype,
            "batch": options.batch,
            "rounds": options.rounds,
            "data": [file.name for file in options.data] or "generated from the demo's tasks",
            "tokens_a_model": [num_tokens([[rows]]) for rows in step],
            "methods": {name: METHODS[name] for name in ("lora", "dora", "mixlora")},
        },
        "rows": [
            {
                "contender": name,
                "models": models,
                "here": asdict(measured[name, models]),
                "here_to_lora": _ratios(measured, (name, models)),
                "published": asdict(published.rows[name, models]) if (name, models) in published.rows else None,
                "published_to_lora": _ratios(published.rows, (name, models)),
                "first_loss": alone[name, models].loss,
                "turns": [asdict(turn) for turn in turns[name, models]],
            }
            for name, models in ROWS
        ],
    }


def _figures(step: Step, row: tuple[str, int], alone: Alone, turns: Sequence[Turn]) -> Figures:
    tokens, models = num_tokens([step[: row[1]]]), row[1]
    seconds = [median(column) for column in zip(*map(astuple, turns), strict=True)]
    forward, backward, inference = (1e6 * each / tokens for each in seconds)
    return Figures(
        forward, backward, alone.training_bytes / 1e9 / models, inference, alone.inference_bytes / 1e9 / models
    )


def _ratios(rows: dict[tuple[str, int], Figures], row: tuple[str, int]) -> dict[str, float] | None:
    """Of each column to that of one LoRA model."""
    if row not in rows:
        return None
    figures, reference = asdict(rows[row]), asdict(rows[REFERENCE])
    return {column: figures[column] / reference[column] for column in COLUMNS}


def _alone(bases: Bases, step: Step, console: Console) -> dict[tuple[str, int], Alone]:
    """Each row's first passes, each kind in a fresh process: a process's peak of memory never falls.

    Raises:
        BenchmarkError: they do not all start from the same loss, so they do not do the same work.
    """
    rows = {}
    processes = machine.fresh_processes(bases.device, preload="benchmarks.paper")
    for name, models in ROWS:
        with ProcessPoolExecutor(1, mp_context=processes, max_tasks_per_child=1) as pool:
            trained = pool.submit(_train_alone, replace(bases, jobs=models), name, models, step)
            inferred = pool.submit(_infer_alone, replace(bases, jobs=models), name, models, step)
            rows[name, models] = Alone(*trained.result(), inferred.result())
        console.print(f"{name} x {models}: first loss {rows[name, models].loss:.4f}", highlight=False)
    require_same_loss([row.loss for row in rows.values()], bases.dtype)
    return rows


def _train_alone(bases: Bases, name: str, models: int, step: Step) -> tuple[float, int]:
    loss, *_ = Contender(bases, name, models).train(step)
    return loss, machine.peak_bytes(bases.device)


def _infer_alone(bases: Bases, name: str, models: int, step: Step) -> int:
    Contender(bases, name, models).infer(step)
    return machine.peak_bytes(bases.device)


def _alternate(bases: Bases, step: Step, rounds: int, console: Console) -> dict[tuple[str, int], list[Turn]]:
    """Each row's turns, one a round, after one that does not count."""
    contenders = {row: Contender(bases, *row) for row in ROWS}
    turns: dict[tuple[str, int], list[Turn]] = {row: [] for row in ROWS}
    for number in range(rounds + 1):
        for row, contender in contenders.items():
            _, forward, backward = contender.train(step)
            turn = Turn(forward, backward, contender.infer(step))
            if number:
                turns[row].append(turn)
        console.print(f"round {number} of {rounds}" if number else "warm", highlight=False)
    return turns


def _show(report: dict[str, Any], console: Console) -> None:
    table = Table(
        title=f"Ratios to LoRA here | in the paper's table {report['table']} ({report['published_base']})",
        caption="Time a token forward, backward and without gradient; peak memory a model in training and without.",
    )
    for heading in ("contender", "models", "forward", "backward", "memory", "inference", "memory"):
        table.add_column(heading, justify="left" if heading == "contender" else "right", no_wrap=True)
    for row in report["rows"]:
        cells = []
        for column in COLUMNS:
            published = row["published_to_lora"]
            cells.append(
                f"{row['here_to_lora'][column]:.2f} | " + (f"{published[column]:.2f}" if published else "   -")
            )
        table.add_row(VARIANTS[row["contender"]].label, str(row["models"]), *cells)
    console.print(table)
    console.print(_circumstances(report), highlight=False)


def _circumstances(report: dict[str, Any]) -> str:
    """All that a figure must be quoted with."""
    settings, about, lora = report["settings"], report["machine"], report["rows"][0]["here"]
    return (
        f"{settings['base']} in {settings['dtype']}, batches of {settings['batch']} rows, "
        f"{settings['tokens_a_model']} tokens a model; median of {settings['rounds']} rounds. LoRA: "
        f"{lora['forward']:.0f} µs a token forward, {lora['backward']:.0f} backward, {lora['inference']:.0f} without "
        f"gradient; {lora['training_memory']:.2f} and {lora['inference_memory']:.2f} GB. {about['device']}: "
        f"{about['cpu']}, {about['capability']}, {' '.join(about['flags'])}, {about['threads']} threads; torch "
        f"{about['torch']}."
    )


def _chart(file: Path | None) -> Callable[[dict[str, Any]], None]:
    """What draws a report to the file; nothing without one.

    Raises:
        BenchmarkError: matplotlib is not there. Said before anything is measured.
    """
    if file is None:
        return lambda report: None
    try:
        from benchmarks.chart import draw
    except ImportError as error:
        raise BenchmarkError("--chart needs matplotlib: pip install matplotlib") from error
    labels = {name: variant.label for name, variant in VARIANTS.items()}
    return lambda report: draw(report, labels, _circumstances(report), file)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks paper", description=__doc__)
    parser.add_argument("--table", type=int, choices=TABLES, default=6, help="whose figures stand beside ours (6)")
    parser.add_argument("--batch", type=positive, default=8, help="rows of each model (8)")
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="JSONL files, one a model in rotation")
    parser.add_argument("--base", default=sources.DEFAULT, help="a hub name, a folder or a GGUF file")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--rounds", type=positive, default=3, help="times that each row is measured (3)")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    parser.add_argument("--chart", type=Path, help="also draw the ratios to this PNG file (needs matplotlib)")
    return parser
