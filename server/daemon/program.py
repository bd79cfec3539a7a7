"""A job as a program that drives a run: from its config, its tokens and a cursor to the next operation.

Knows no SQL and no scheduler. A *unit* is one optimizer step or one evaluation; a cursor stands between units.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from engine.engine import Engine
from engine.run import Microbatch, Outcome, Row, Run
from server import curriculum
from server.daemon.tally import LossesBySet, Tally
from server.tokens import TokenRows

LOADS_EVERY = 10
"""Steps from one whose experts' loads are kept to the next, counted back from the last."""


@dataclass(frozen=True)
class Cursor:
    """Where a job stands between two units; with the run's own state it is all that a resume needs."""

    step: int = 0  # optimizer steps taken
    tokens: int = 0  # trained so far
    evaluating: bool = False  # the evaluation of `step` is still to be done

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Work:
    """One microbatch of the unit under way."""

    rows: list[int]
    num_tokens: int
    is_training: bool


@dataclass(frozen=True)
class StepReport:
    """What an optimizer step came to."""

    step: int
    epoch: float
    tokens: int  # trained so far
    step_tokens: int
    train_loss: float
    train_losses: list[float | None] | None  # of each data set of a mixture
    aux_loss: float | None
    learning_rate: float
    grad_norm: float
    expert_loads: list[list[int]] | None  # slots of each expert, by layer; None where they are not kept


@dataclass(frozen=True)
class Evaluation:
    """What the validation rows came to: the mean loss a supervised token."""

    step: int
    valid_loss: float
    valid_losses: list[float | None] | None  # of each data set of a mixture, where rows of each are held out


class Diverged(ArithmeticError):
    """The unit under way cannot be ended: the loss of `works` is infinite or not a number; if none, the gradient."""

    def __init__(self, works: Sequence[Work] = ()):
        super().__init__()
        self.works = works


class JobProgram:
    """Offers the microbatches of the unit under way, takes their outcomes, and ends the unit."""

    def __init__(
        self,
        training: dict[str, Any],
        train: TokenRows,
        valid: TokenRows | None,
        cursor: Cursor,
        parts: Sequence[Mapping[str, Any]] | None = None,
    ):
        """`parts` is a job's `mixture`, whose sets' rows lie end to end in `train` and `valid`."""
        self.training = training
        self.train = train
        self.valid = valid
        self.cursor = cursor
        self._mixture = curriculum.Mixture.of(parts, len(train))
        self._train_rows = [part["rows"] for part in parts or ()]
        self._valid_rows = [part["validation_rows"] for part in parts or ()]
        self._unit: list[Work] = []
        self._num_tokens = 0
        self._num_targets = 0
        self._done = 0
        self._tally = Tally()
        self._begin()

    @property
    def is_finished(self) -> bool:
        return self.cursor.step >= self.training["total_steps"] and not self.cursor.evaluating

    @property
    def at_boundary(self) -> bool:
        """Whether no microbatch of the unit has been done: the state can be saved."""
        return self._done == 0

    @property
    def unit_is_done(self) -> bool:
        return not self.is_finished and self._done == len(self._unit)

    def offered(self) -> list[Work]:
        """The microbatches left of the unit, in order."""
        return [] if self.is_finished else self._unit[self._done :]

    def microbatch(self, work: Work, run: Run) -> Microbatch:
        """The engine's form of one: each supervised token weighs 1 / (those of its whole optimizer step)."""
        if not work.is_training:
            rows = [self._row(self.valid, index, 1.0) for index in work.rows]
            return Microbatch(rows=rows, adapter=run.adapter)
        rows = [self._row(self.train, index, 1 / self._num_targets) for index in work.rows]
        return Microbatch(rows=rows, run=run, auxiliary_weight=work.num_tokens / self._num_tokens)

    def begin_unit_anew(self) -> None:
        """Forget what was done of the unit under way."""
        self._begin()

    def took(self, works: Sequence[Work], outcomes: Sequence[Outcome]) -> None:
        """Add what the next microbatches came to. Raises `Diverged`."""
        broke = [work for work, outcome in zip(works, outcomes, strict=True) if not math.isfinite(outcome.loss)]
        if broke:
            raise Diverged(broke)
        for work, outcome in zip(works, outcomes, strict=True):
            self._tally.add(work.rows, outcome, share=work.num_tokens / self._num_tokens)
        self._done += len(works)

    def end_step(self, engine: Engine, run: Run) -> StepReport:
        """Take the optimizer step of a training unit that is done.

        Raises `Diverged` where the gradient is no number; the run's weights are then those before the step.
        """
        rate = curriculum.learning_rate(
            self.cursor.step,
            peak=self.training["learning_rate"],
            schedule=self.training["schedule"],
            warmup_steps=self.training["warmup_steps"],
            total_steps=self.training["total_steps"],
        )
        grad_norm = engine.optim_step(
            run,
            learning_rate=rate,
            weight_decay=self.training["weight_decay"],
            max_grad_norm=self.training["max_grad_norm"],
            loraplus_ratio=self.training["loraplus_ratio"],
        )
        if not math.isfinite(grad_norm):
            raise Diverged
        step, tokens = self.cursor.step + 1, self.cursor.tokens + self._num_tokens
        per_epoch = curriculum.steps_per_epoch(len(self.train), self.training["batch_size"])
        report = StepReport(
            step=step,
            epoch=step / per_epoch,
            tokens=tokens,
            step_tokens=self._num_tokens,
            train_loss=self._tally.loss,
            train_losses=self._tally.losses,
            aux_loss=self._tally.aux_loss,
            learning_rate=rate,
            grad_norm=grad_norm,
            expert_loads=self._loads_to_keep(step),
        )
        self.cursor = Cursor(step, tokens, evaluating=self._evaluation_is_due(step))
        self._begin()
        return report

    def end_evaluation(self) -> Evaluation:
        """What an evaluation that is done came to."""
        report = Evaluation(self.cursor.step, self._tally.loss / self._num_targets, self._tally.losses)
        self.cursor = Cursor(self.cursor.step, self.cursor.tokens)
        self._begin()
        return report

    def step_ends_in_checkpoint(self) -> bool:
        """Whether an adapter is published after the optimizer step under way."""
        step = self.cursor.step + 1
        return step % self.training["checkpoint_every"] == 0 or step == self.training["total_steps"]

    def checkpoint_is_due(self) -> bool:
        """Whether the state between units that the cursor is at is to be published as a checkpoint."""
        step = self.cursor.step
        return not self.cursor.evaluating and step > 0 and step % self.training["checkpoint_every"] == 0

    def _loads_to_keep(self, step: int) -> list[list[int]] | None:
        """Those of the last step, and of each tenth before it."""
        loads = self._tally.expert_loads
        is_kept = (self.training["total_steps"] - step) % LOADS_EVERY == 0
        return loads.tolist() if loads is not None and is_kept else None

    def _evaluation_is_due(self, step: int) -> bool:
        every = self.training["evaluate_every"]
        return self.valid is not None and bool(every) and (step % every == 0 or step == self.training["total_steps"])

    def _begin(self) -> None:
        """Cut the next unit into microbatches."""
        self._done = 0
        num_rows = self._valid_rows if self.cursor.evaluating else self._train_rows
        self._tally = Tally(by_set=LossesBySet(num_rows) if any(num_rows) else None)
        self._unit = []
        if self.is_finished:
            return
        rows = self.valid if self.cursor.evaluating else self.train
        assert rows is not None
        indices = (
            np.arange(len(rows))
            if self.cursor.evaluating
            else curriculum.rows_of_step(
                self.cursor.step,
                mixture=self._mixture,
                batch_size=self.training["batch_size"],
                seed=self.training["seed"],
            )
        )
        for part in curriculum.cut(indices.tolist(), rows.lengths, self.training["microbatch_tokens"]):
            self._unit.append(Work(part, int(rows.lengths[part].sum()), not self.cursor.evaluating))
        self._num_tokens = sum(work.num_tokens for work in self._unit)
        self._num_targets = sum(len(rows.row(int(index))[1]) for index in indices)

    def _row(self, rows: TokenRows | None, index: int, weight: float) -> Row:
        assert rows is not None
        tokens, targets = rows.row(index)
        return Row(tokens, targets, np.full(len(targets), weight))
