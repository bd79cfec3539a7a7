"""Who is measured: each takes the same steps on the same token lists.

The limits have no adapter and nothing to train: they run forward, the gradient at the embeddings, and the loss on
supervised rows. All others also take each job's optimizer step, with the gradient's norm clipped to 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import machine
from benchmarks.bases import LEARNING_RATE, MAX_GRAD_NORM, METHODS, Bases
from benchmarks.data import Step
from benchmarks.errors import BenchmarkError
from engine.base_model import BaseModel, input_gradient
from engine.engine import Engine
from engine.loss import LOSSES, target_logprobs
from engine.run import Microbatch, Row, Run
from engine.segments import Segment, pack

SAME_LOSS = {"float32": 1e-4, "bfloat16": 0.02}
"""All contenders start as the base alone: how far rounding takes their first losses apart, as a share."""

STEPS_TO_PEAK = 3
"""At its first step an optimizer may have no moments yet; what later steps free and take again lies in more pieces."""


class Contender(Protocol):
    trainable_parameters: int
    """Of one job."""

    def step(self, step: Step) -> float:
        """Do one step of every job; the mean loss of the first job's supervised tokens before it."""


class PackedLimit:
    """The base alone, all jobs in one gang of ours."""

    trainable_parameters = 0

    def __init__(self, base: BaseModel):
        self.base = base
        self.engine = Engine(base)

    def step(self, step: Step) -> float:
        sizes = [sum(len(row.tokens) for row in rows) for rows in step]
        with input_gradient(self.base.model):
            losses = self.engine.in_passes(sizes, lambda riders: self._pass([step[job] for job in riders]))
        return next(loss for riders, loss in losses if riders[0] == 0)

    def _pass(self, step: Step) -> float:
        segment = Segment([torch.from_numpy(row.tokens) for rows in step for row in rows])
        batch = pack([segment], self.base.device)
        targets = packed_targets([row for rows in step for row in rows], self.base.device)
        with self.base.pass_.over(batch):
            hidden = self.base.hidden_states(batch)
            loss, logprobs = target_logprobs(hidden, self.base.head, *targets, LOSSES["cross_entropy"])
            loss.backward()
        return -float(logprobs[: sum(len(row.targets) for row in step[0])].mean())


class SequenceLimit:
    """The base alone, by transformers' own `sdpa` model, one sequence at a time: nothing is padded or packed."""

    trainable_parameters = 0

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def step(self, step: Step) -> float:
        with input_gradient(self.model):
            losses = [self._sequence(row) for rows in step for row in rows]
        return float(torch.stack(losses[: len(step[0])]).sum())

    def _sequence(self, row: Row) -> Tensor:
        tokens, targets = torch.from_numpy(row.tokens), torch.from_numpy(row.targets)
        weights = torch.from_numpy(row.weights).to(self.model.device, torch.float32)
        output = self.model(
            input_ids=tokens[None].to(self.model.device),
            logits_to_keep=(targets - 1).to(self.model.device),  # the head runs on these rows alone
            use_cache=False,
        )
        losses = F.cross_entropy(output.logits[0].float(), tokens[targets].to(self.model.device), reduction="none")
        loss = (losses * weights).sum()
        loss.backward()
        return loss.detach()


class Packed:
    """Our engine: `jobs_a_pass` of the jobs in one gang, the adapters of all in memory."""

    def __init__(self, base: BaseModel, runs: list[Run], jobs_a_pass: int):
        self.engine = Engine(base)
        self.runs = runs
        self.jobs_a_pass = jobs_a_pass
        self.trainable_parameters = runs[0].adapter.flat.numel()

    def step(self, step: Step) -> float:
        loss = self.forward_backward(step)
        self.optim_step()
        return loss

    def forward_backward(self, step: Step) -> float:
        """The loss of the first job."""
        jobs = [Microbatch(rows=rows, run=run) for rows, run in zip(step, self.runs, strict=True)]
        outcomes = []
        for start in range(0, len(jobs), self.jobs_a_pass):
            outcomes += self.engine.forward_backward(jobs[start : start + self.jobs_a_pass])
        return outcomes[0].loss

    def optim_step(self) -> None:
        for run in self.runs:
            self.engine.optim_step(run, learning_rate=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM)


def packed_targets(rows: list[Row], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(row of the pack that predicts, target id, weight) of all targets, [N] each."""
    starts = np.cumsum([0, *(len(row.tokens) for row in rows[:-1])])
    columns = (
        np.concatenate([start + row.targets - 1 for start, row in zip(starts, rows, strict=True)]),
        np.concatenate([row.tokens[row.targets] for row in rows]),
        np.concatenate([row.weights for row in rows]),
    )
    places, targets, weights = (torch.from_numpy(column).to(device) for column in columns)
    return places, targets, weights


def require_same_loss(losses: Sequence[float], dtype: str) -> None:
    """An untrained adapter changes nothing: who starts from another loss does other work.

    Raises:
        BenchmarkError: they differ by more than rounding.
    """
    if not np.ptp(losses) <= SAME_LOSS[dtype] * np.max(losses):  # true for what is no number, too
        raise BenchmarkError(f"The contenders start from different losses: {losses}. This is a fault of the benchmark.")


def _peft(bases: Bases) -> Contender:
    from benchmarks.hf_peft import Peft  # seconds to load, and no part of what the others need

    return Peft(bases.plain())


def _moe_peft(bases: Bases) -> Contender:
    from benchmarks.moe_peft_contender import MoePeft

    return MoePeft(bases)


def _packed(method: str) -> Callable[[Bases], Contender]:
    return lambda bases: Packed(bases.packed, bases.runs(method), bases.jobs_a_pass)


CONTENDERS: dict[str, Callable[[Bases], Contender]] = {
    "limit_packed": lambda bases: PackedLimit(bases.packed),
    "limit_transformers": lambda bases: SequenceLimit(bases.plain()),
    **{method: _packed(method) for method in METHODS},
    "mixlora_one_job_a_pass": lambda bases: Packed(bases.packed, bases.runs("mixlora"), 1),
    "peft": _peft,
    "moe_peft": _moe_peft,
}


@dataclass(frozen=True)
class Alone:
    """What a contender's first steps came to, in a process of its own."""

    loss: float
    """Of the first step."""
    peak_bytes: int
    trainable_parameters: int


def alone(name: str, bases: Bases, step: Step, steps: int = STEPS_TO_PEAK) -> Alone:
    """So many steps; for a fresh process, since a process's peak of memory never falls."""
    contender = CONTENDERS[name](bases)
    loss = contender.step(step)
    for _ in range(1, steps):
        contender.step(step)
    machine.synchronize(bases.device)
    return Alone(loss, machine.peak_bytes(bases.device), contender.trainable_parameters)
