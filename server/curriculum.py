"""What a job trains on at each optimizer step: pure functions of its config, so that a cursor is one number.

Numpy only: the API counts steps and tokens with it at submit, the daemon follows it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

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


@dataclass(frozen=True)
class Mixture:
    """The data sets of a job, whose rows lie end to end, and how many rows of each an epoch takes.

    An epoch takes as many rows as there are in all. A set goes round: what an epoch left of it comes in the next
    ones before any row comes again, each time round in another order.
    """

    num_rows: tuple[int, ...]  # of each set
    epoch_rows: tuple[int, ...]  # the same sum

    @classmethod
    def single(cls, num_rows: int) -> "Mixture":
        """One set, of which an epoch takes every row."""
        return cls((num_rows,), (num_rows,))

    @classmethod
    def of(cls, parts: Sequence[Mapping[str, Any]] | None, num_rows: int) -> "Mixture":
        """That of a job's `mixture`, which is None for a single set."""
        if parts is None:
            return cls.single(num_rows)
        return cls(tuple(part["rows"] for part in parts), tuple(part["epoch_rows"] for part in parts))

    @property
    def total(self) -> int:
        """Rows of all sets, and of an epoch."""
        return sum(self.num_rows)

    @property
    def starts(self) -> list[int]:
        """The first row of each set."""
        return np.cumsum((0, *self.num_rows[:-1])).tolist()


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """`total` rows divided as the weights say, by largest remainder; of equal ones the earlier gets the row."""
    exact = [total * Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    counts = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda part: counts[part] - exact[part])
    for part in by_remainder[: total - sum(counts)]:
        counts[part] += 1
    return counts


def _round(mixture: Mixture, part: int, number: int, seed: int) -> np.ndarray:
    """The order in which a set is gone through the `number`th time, int64 [its rows]."""
    return permutation(seed, ((part + 1) << 32) + number, mixture.num_rows[part])


def _taken(mixture: Mixture, part: int, epoch: int, seed: int) -> np.ndarray:
    """What an epoch takes of a set, int64 [epoch_rows of it], numbered within the set."""
    num_rows, count = mixture.num_rows[part], mixture.epoch_rows[part]
    if count == num_rows:
        return np.arange(num_rows)  # every row once: the order of the epoch is all that is to be drawn
    first, skipped = divmod(epoch * count, num_rows)
    rounds = range(first, first + -(-(skipped + count) // num_rows))
    return np.concatenate([_round(mixture, part, number, seed) for number in rounds])[skipped:][:count]


@lru_cache(maxsize=16)
def order(mixture: Mixture, seed: int, epoch: int) -> np.ndarray:
    """The rows of one epoch in their order, int64 [mixture.total], not to be written to."""
    taken = np.concatenate([start + _taken(mixture, part, epoch, seed) for part, start in enumerate(mixture.starts)])
    rows: np.ndarray = taken[permutation(seed, epoch, mixture.total)]
    rows.setflags(write=False)
    return rows


def rows_of_step(step: int, *, mixture: Mixture, batch_size: int, seed: int) -> np.ndarray:
    """The rows of optimizer step `step` (from 0), int64 [up to batch_size]."""
    epoch, index = divmod(step, steps_per_epoch(mixture.total, batch_size))
    return order(mixture, seed, epoch)[index * batch_size : (index + 1) * batch_size]


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


def tokens_of_steps(total_steps: int, *, mixture: Mixture, lengths: np.ndarray, batch_size: int, seed: int) -> int:
    """Tokens that `total_steps` optimizer steps train on; `lengths` are those of all rows, int64 [mixture.total]."""
    epochs, rest = divmod(total_steps, steps_per_epoch(mixture.total, batch_size))
    total = lengths[order(mixture, seed, epochs)[: rest * batch_size]].sum()
    for part, start in enumerate(mixture.starts):
        mine = lengths[start : start + mixture.num_rows[part]]
        rounds, left = divmod(epochs * mixture.epoch_rows[part], len(mine))
        total += rounds * mine.sum() + mine[_round(mixture, part, rounds, seed)[:left]].sum()
    return int(total)


def learning_rate(step: int, *, peak: float, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """The rate of optimizer step `step` (from 0): linear warm-up, then constant, linear or cosine decay to 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (1 - progress) if schedule == "linear" else peak
