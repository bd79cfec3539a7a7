"""What a job trains on at each optimizer step: pure functions of its config, so that a cursor is one number.

Numpy only: the API counts steps and tokens with it at submit, the daemon follows it.
"""

import math
from collections.abc import Sequence

import numpy as np


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64, elementwise on uint64: well-spread bits, the same on every numpy."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """The order of the rows in one epoch, int64 [num_rows]: another one for each epoch and seed."""
    with np.errstate(over="ignore"):
        key = _mix(_mix(np.array([seed], np.uint64)) + np.array([epoch], np.uint64))
        return np.argsort(_mix(np.arange(1, num_rows + 1, dtype=np.uint64) * _mix(key + np.uint64(1))), kind="stable")


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Optimizer steps in an epoch; the last one may hold fewer rows."""
    return math.ceil(num_rows / batch_size)


def rows_of_step(step: int, *, num_rows: int, batch_size: int, seed: int) -> np.ndarray:
    """The rows of optimizer step `step` (from 0), int64 [up to batch_size]."""
    epoch, index = divmod(step, steps_per_epoch(num_rows, batch_size))
    return permutation(seed, epoch, num_rows)[index * batch_size : (index + 1) * batch_size]


def cut(rows: Sequence[int], lengths: np.ndarray, cap: int) -> list[list[int]]:
    """Rows, in order, as microbatches of at most `cap` tokens (a longer row stands alone)."""
    microbatches: list[list[int]] = []
    room = -1
    for row in rows:
        length = int(lengths[row])
        if length > room:
            microbatches.append([])
            room = cap
        microbatches[-1].append(int(row))
        room -= length
    return microbatches


def tokens_of_steps(total_steps: int, *, lengths: np.ndarray, batch_size: int, seed: int) -> int:
    """Tokens that `total_steps` optimizer steps train on."""
    num_rows = len(lengths)
    epochs, rest = divmod(total_steps, steps_per_epoch(num_rows, batch_size))
    partial = permutation(seed, epochs, num_rows)[: rest * batch_size]
    return int(epochs * lengths.sum() + lengths[partial].sum())


def learning_rate(step: int, *, peak: float, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """The rate of optimizer step `step` (from 0): linear warm-up, then constant, linear or cosine decay to 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (1 - progress) if schedule == "linear" else peak
