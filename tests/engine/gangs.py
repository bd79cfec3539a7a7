"""Jobs cut into microbatches, and who rides with whom: what a run's bits must not depend on."""

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from safetensors.torch import save

from engine import formats
from engine.config import AdapterConfig
from engine.engine import Engine
from engine.run import Microbatch, Row, Run

Gang = list[int]
"""Indices of jobs: each rides with its next microbatch, one that is named twice with its next two."""


@dataclass(frozen=True)
class Job:
    """An adapter's config and seed, and its data: optimizer steps of microbatches of rows."""

    config: AdapterConfig
    seed: int
    steps: list[list[list[Row]]]
    loraplus_ratio: float = 1.0

    @property
    def num_microbatches(self) -> int:
        return sum(map(len, self.steps))


def random_job(config: AdapterConfig, seed: int, lengths: Sequence[Sequence[Sequence[int]]], vocabulary: int) -> Job:
    """Random rows of the given lengths (steps of microbatches of rows); half of their tokens are supervised."""
    draw = np.random.default_rng(seed)

    def row(length: int) -> Row:
        targets = [place for place in range(1, length) if place == length - 1 or draw.random() < 0.5]
        return Row(draw.integers(0, vocabulary, length), np.array(targets, np.int64), np.full(len(targets), 0.1))

    return Job(config, seed, [[[row(n) for n in microbatch] for microbatch in step] for step in lengths])


def random_gangs(jobs: Sequence[Job], draw: random.Random) -> list[Gang]:
    """Every job to its end, in any company and order: some join late, and some ride with several microbatches."""
    joins = [draw.randrange(4) for _ in jobs]
    left = [[len(step) for step in job.steps] for job in jobs]
    gangs: list[Gang] = []
    for number in range(1000):
        gang: Gang = []
        for index, steps in enumerate(left):
            if steps and joins[index] <= number and draw.random() < 0.7:
                count = draw.randint(1, steps[0])
                gang += [index] * count
                steps[0] -= count
                left[index] = [step for step in steps if step]
        draw.shuffle(gang)
        gangs += [gang] if gang else []
        if not any(left):
            break
    return gangs


def train(engine: Engine, jobs: Sequence[Job], gangs: Iterable[Gang]) -> list[str]:
    """sha256 of each job's adapter after all gangs; an optimizer step as soon as its microbatches are done."""
    runs = [engine.create_run(job.config, job.seed) for job in jobs]
    places = [[(step, part) for step, parts in enumerate(job.steps) for part in range(len(parts))] for job in jobs]
    for gang in gangs:
        taken = [(index, *places[index].pop(0)) for index in gang]
        engine.forward_backward(
            [
                Microbatch(rows=jobs[index].steps[step][part], run=runs[index], auxiliary_weight=0.5)
                for index, step, part in taken
            ]
        )
        for index, step, part in taken:
            if part == len(jobs[index].steps[step]) - 1:
                ratio = jobs[index].loraplus_ratio
                engine.optim_step(runs[index], learning_rate=0.02, loraplus_ratio=ratio)
    assert not any(places), "the gangs end before the jobs"
    return [fingerprint(run) for run in runs]


def train_alone(engine: Engine, job: Job) -> str:
    """sha256 of a job's adapter when each microbatch has a pass of its own."""
    return train(engine, [job], [[0]] * job.num_microbatches)[0]


def fingerprint(run: Run) -> str:
    """sha256 of the bytes that the adapter is published with."""
    return hashlib.sha256(save(formats.tensors(run.adapter))).hexdigest()
