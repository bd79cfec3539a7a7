"""The token lists that every contender trains on: one file, or one generated task, a job in rotation."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.errors import BenchmarkError
from engine.base_model import BaseModel
from engine.run import Row
from mixloom.demo.tasks import TASKS
from server.daemon.publish import publish_tokenizer, read_tokenizer
from server.errors import MixloomError
from server.render import Renderer, render_rows
from server.settings import Settings
from server.shapes import shape_of
from server.store import LocalStore
from server.tokens import TokenRow

Step = list[list[Row]]
"""One optimizer step of every job: its batch of rows, job by job."""
SHORTEST = 16
"""No row of the demo has fewer tokens."""


def make_steps(base: BaseModel, source: Path, files: Sequence[Path], *, jobs: int, batch: int, rows: int) -> list[Step]:
    """`rows` rows in all, the same for each job, rendered by the base's own template; deterministic.

    `source` is the base's folder. Each supervised token weighs 1 / (those of its batch).

    Raises:
        BenchmarkError: a file lacks rows or has some that cannot be rendered, or a row is too long.
    """
    if rows < jobs * batch or rows % (jobs * batch):
        raise BenchmarkError(
            f"--rows is the rows of all jobs together, a multiple of jobs x batch = {jobs * batch}; got {rows}."
        )
    each = rows // jobs
    renderer = _renderer(base, source)
    drawn = _from_files(files, jobs, each) if files else _generated(jobs, each)
    per_job = [_render(renderer, texts, base.context) for texts in drawn]
    return [[_weighed(token_rows[start : start + batch]) for token_rows in per_job] for start in range(0, each, batch)]


def cut_rows(base: BaseModel, source: Path, *, jobs: int, rows: int, tokens: int) -> Step:
    """One step of rows of exactly so many tokens: the demo's rows end to end, cut; the last quarter is supervised.

    Raises:
        BenchmarkError: the base does not take so many tokens, or they are too few to supervise any.
    """
    if not 4 <= tokens <= base.context:
        raise BenchmarkError(f"--tokens is from 4 to {base.context} on this base; got {tokens}.")
    each = -(-rows * tokens // SHORTEST)
    renderer = _renderer(base, source)
    supervised = np.arange(tokens - tokens // 4, tokens)
    weights = np.full(len(supervised), 1 / (rows * len(supervised)))
    step = []
    for texts in _generated(jobs, each):
        stream = np.concatenate([row.tokens for row in _render(renderer, texts, base.context)])
        step.append(
            [Row(stream[start : start + tokens], supervised, weights) for start in range(0, rows * tokens, tokens)]
        )
    return step


def num_tokens(steps: Sequence[Step]) -> int:
    """Real tokens of all rows."""
    return sum(len(row.tokens) for row in all_rows(steps))


def all_rows(steps: Sequence[Step]) -> list[Row]:
    return [row for step in steps for rows in step for row in rows]


def _generated(jobs: int, each: int) -> list[list[dict[str, str]]]:
    """Rows of the demo's tasks, some 40 to 60 tokens long with SmolLM2's template."""
    tasks = list(TASKS.values())
    return [tasks[job % len(tasks)].train_rows(each, seed=job) for job in range(jobs)]


def _from_files(files: Sequence[Path], jobs: int, each: int) -> list[list[dict[str, str]]]:
    """Job i takes file i mod files, and the rows after those of the job before it on that file."""
    drawn = []
    for job in range(jobs):
        file, turn = files[job % len(files)], job // len(files)
        lines = _lines(file)
        if len(lines) < (turn + 1) * each:
            raise BenchmarkError(
                f"{file} has {len(lines)} rows, {(turn + 1) * each} are needed: give more files, or fewer --rows."
            )
        drawn.append(lines[turn * each : (turn + 1) * each])
    return drawn


def _lines(file: Path) -> list[dict[str, str]]:
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{file} cannot be read as JSON lines: {error}") from error


def _renderer(base: BaseModel, source: Path) -> Renderer:
    """The product's own: through a store, as the daemon publishes a base to the API."""
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(Path(folder))
        return Renderer(store.path(publish_tokenizer(store, base, read_tokenizer(base, source, Settings()))))


def _render(renderer: Renderer, texts: Sequence[dict[str, str]], context: int) -> list[TokenRow]:
    if not all(isinstance(row, dict) and shape_of(row) for row in texts):
        raise BenchmarkError("Each row needs prompt and completion (or messages, or text).")
    try:
        token_rows = render_rows(renderer, texts, "completion")
    except MixloomError as error:
        raise BenchmarkError(error.message) from error
    longest = max(len(row.tokens) for row in token_rows)
    if longest > context:
        raise BenchmarkError(f"A row has {longest} tokens, this base takes {context}; leave such rows out.")
    return token_rows


def _weighed(token_rows: Sequence[TokenRow]) -> list[Row]:
    """One batch of one job."""
    targets = [np.flatnonzero(row.supervised) for row in token_rows]
    weight = 1 / sum(map(len, targets))
    return [
        Row(np.array(row.tokens), positions, np.full(len(positions), weight))
        for row, positions in zip(token_rows, targets, strict=True)
    ]
