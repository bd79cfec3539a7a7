"""The five operations on runs: forward, forward_backward, optim_step, sample (in `sampling`), save and load.

Everything else in this package serves these. The engine sees token ids and weights; it knows no text.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from itertools import product
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from engine import formats, recovery
from engine.adapter import Adapter, Weights
from engine.base_model import BaseModel
from engine.config import AdapterConfig
from engine.device import to_device
from engine.dropout import Drops
from engine.errors import EngineError
from engine.exactness import any_number_of_threads, any_number_of_threads_at
from engine.lanes import Riders, side_by_side, spread
from engine.loss import LOSSES, Loss, target_logprobs
from engine.random import DropoutKey
from engine.run import Microbatch, Outcome, Run
from engine.segments import FEWEST_ROWS, Segment, pack
from engine.stacks import stacked

T = TypeVar("T")
Height = tuple[int, torch.dtype]
"""Rows of an A, a B or a router, and what they are multiplied in."""


class Engine:
    """Trains and applies many adapters on one frozen base, many microbatches of different runs in one pass."""

    def __init__(self, base: BaseModel):
        self.base = base
        self._shares_exactly: dict[tuple[int, Height | None], bool] = {}
        """Whether passes may share so many threads: of the base, and of an adapter's matrices of a height."""

    def create_run(self, config: AdapterConfig, seed: int, start: Path | None = None) -> Run:
        """An adapter with a fresh optimizer: with random weights, or with those of the native files in `start`.

        Raises:
            EngineError: the adapter does not fit the base, or `start` does not fit the adapter.
        """
        adapter = self._empty_adapter(config)
        if start is None:
            adapter.initialize(seed)
            self.base.initialize_magnitudes(adapter)
        else:
            formats.fill(adapter, start)
        return Run.fresh(adapter, seed)

    def forward(self, microbatches: Sequence[Microbatch]) -> list[Outcome]:
        """Log-probs of the targets, without dropout and without gradient."""
        return self.compute([], microbatches)[1]

    def forward_backward(self, microbatches: Sequence[Microbatch]) -> list[Outcome]:
        """Adds d Σ w·loss (plus the auxiliary loss) to each run's gradient, in microbatch order."""
        return self.compute(microbatches, [])[0]

    def compute(
        self, train: Sequence[Microbatch], evaluate: Sequence[Microbatch]
    ) -> tuple[list[Outcome], list[Outcome]]:
        """`forward_backward` of some and `forward` of others, side by side."""
        segments, extra = [], []
        weights: dict[int, Weights] = {}
        seen: Counter[int] = Counter()
        for m in train:
            assert m.run is not None, "only a run can be trained"
            key = id(m.run)
            if not seen[key]:
                weights[key] = mine = Weights.of(m.run.adapter, self.base.dtype, m.run.gradient)
            else:  # a second microbatch of a run: its own gradient, added after the first one's
                gradient = torch.zeros_like(m.run.gradient)
                mine = weights[key].with_gradient(gradient)
                extra.append((m.run, gradient))
            dropout = m.run.dropout_key(m.run.microbatch + seen[key])
            segments.append(_segment(m, mine, dropout))
            seen[key] += 1
        segments += [_segment(m, self._weights(m)) for m in evaluate]
        outcomes = self._passes([*train, *evaluate], segments, len(train))
        for run, gradient in extra:
            run.gradient += gradient
        for m in train:
            assert m.run is not None
            m.run.microbatch += 1
        return outcomes[: len(train)], outcomes[len(train) :]

    def optim_step(
        self,
        run: Run,
        *,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        loraplus_ratio: float = 1.0,
    ) -> float:
        """AdamW on the accumulated gradient, which is then zeroed; returns its norm before clipping.

        `loraplus_ratio` times the learning rate is that of every B (LoRA+). Where the norm is not finite, the
        weights and moments stay as they are.
        """
        norm = run.optimizer.update(
            run.adapter.flat,
            run.gradient,
            learning_rate=learning_rate,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            faster=run.adapter.layout.range_of("B"),
            ratio=loraplus_ratio,
        )
        run.discard_gradient()
        return norm

    def save(self, run: Run, folder: Path) -> None:
        """Write all that `load` needs to go on with the same bits."""
        recovery.write(recovery.capture(run), folder)

    def load(self, folder: Path) -> Run:
        """A run as it was saved.

        Raises:
            EngineError: the files are not those of a run on this base.
        """
        return recovery.read(folder, self._empty_adapter, self.base.device)

    def load_adapter(self, folder: Path) -> Adapter:
        """Published weights, to sample or evaluate with.

        Raises:
            EngineError: the adapter does not fit the base.
        """
        return formats.read(folder, self._empty_adapter)

    def in_passes(
        self,
        sizes: Sequence[int],
        work: Callable[[Riders], T],
        *,
        efforts: Sequence[int] | None = None,
        heights: Sequence[Set[Height]] | None = None,
        num_trained: int | None = None,
    ) -> list[tuple[Riders, T]]:
        """`work` of each of the passes that a gang takes, whose microbatches have so many tokens (`lanes.spread`).

        The first `num_trained`, if given, ride apart from the others. On CUDA each kind is one pass. Microbatches whose
        results may depend on the number of threads, by their size or by the `heights` of their matrices, have all.
        """
        efforts, border = efforts or sizes, len(sizes) if num_trained is None else num_trained
        kinds = [kind for kind in (range(border), range(border, len(sizes))) if kind]
        if self.base.device.type != "cpu" or len(sizes) == 1:
            return [(list(kind), work(list(kind))) for kind in kinds]
        beside: list[Riders] = []
        after: list[Riders] = []
        shares = [
            self.threads_to_share(heights[i] if heights else ()) if size >= FEWEST_ROWS else 1
            for i, size in enumerate(sizes)
        ]
        for kind, lanes in product(kinds, sorted(set(shares))):
            mine = [i for i in kind if shares[i] == lanes]
            of_kind = spread([sizes[i] for i in mine], lanes, [efforts[i] for i in mine]) if mine else []
            (beside if lanes > 1 else after).extend([mine[i] for i in riders] for riders in of_kind)
        beside.sort(key=lambda riders: -sum(efforts[i] for i in riders))
        done: list[tuple[Riders, T]] = []
        for passes, lanes in ((beside, torch.get_num_threads()), (after, 1)):
            if passes:
                done += zip(passes, side_by_side(work, passes, lanes), strict=True)
        return done

    def threads_to_share(self, heights: Iterable[Height] = ()) -> int:
        """How many threads the passes of a gang may share: 1 where a result would depend on it."""
        threads = torch.get_num_threads()
        for height in (None, *heights):
            if (threads, height) not in self._shares_exactly:
                is_exact = any_number_of_threads_at(self.base, *height) if height else any_number_of_threads(self.base)
                self._shares_exactly[threads, height] = is_exact
            if not self._shares_exactly[threads, height]:
                return 1
        return threads

    def _empty_adapter(self, config: AdapterConfig) -> Adapter:
        self.base.check(config)
        layout = self.base.layout(config)
        precise = torch.promote_types(self.base.dtype, torch.float32)
        return Adapter(config, layout, torch.zeros(layout.size, dtype=precise, device=self.base.device))

    def _weights(self, microbatch: Microbatch) -> Weights | None:
        adapter = microbatch.adapter or (microbatch.run.adapter if microbatch.run else None)
        return None if adapter is None else Weights.of(adapter, self.base.dtype)

    def _passes(
        self, microbatches: Sequence[Microbatch], segments: Sequence[Segment], num_trained: int
    ) -> list[Outcome]:
        def work(riders: Riders) -> list[Outcome]:
            with torch.set_grad_enabled(riders[0] < num_trained):
                return self._pass([microbatches[i] for i in riders], [segments[i] for i in riders])

        sizes, efforts = [segment.num_tokens for segment in segments], [segment.effort for segment in segments]
        heights = [self._heights(segment.weights) for segment in segments]
        outcomes: dict[int, Outcome] = {}
        for riders, of_pass in self.in_passes(sizes, work, efforts=efforts, heights=heights, num_trained=num_trained):
            outcomes.update(zip(riders, of_pass, strict=True))
        return [outcomes[index] for index in range(len(microbatches))]

    def _heights(self, weights: Weights | None) -> Set[Height]:
        if weights is None:
            return frozenset()
        routers = {(weights.config.num_experts, weights.precise.dtype)} if weights.config.num_experts else set()
        return {(height, self.base.dtype) for height in weights.layout.heights} | routers

    def _pass(self, microbatches: Sequence[Microbatch], segments: Sequence[Segment]) -> list[Outcome]:
        riding = stacked(segments, self.base)
        order = [index for indices, _ in riding for index in indices]
        ordered = [microbatches[index] for index in order]
        batch = pack([segment for _, segment in riding], self.base.device)
        rows, targets, weights = _targets(ordered, self.base.device)
        with self.base.pass_.over(batch):
            hidden = self.base.hidden_states(batch)
            loss, logprobs = target_logprobs(hidden, self.base.head, rows, targets, weights, _loss(microbatches))
            auxiliary = [aux for indices, segment in riding for aux in _of_each(segment.aux_loss, indices)]
            if torch.is_grad_enabled():
                terms = zip(ordered, auxiliary, strict=True)
                torch.autograd.backward([loss, *(a * m.auxiliary_weight for m, a in terms if a is not None)])
        for indices, segment in riding:
            if segment.rows is not None and segment.weights is not None:
                segment.weights.add_gradients([w for i in indices if (w := segments[i].weights) is not None])
        loads = [_loads(segment) for _, segment in riding]
        each = [load for (indices, _), of in zip(riding, loads, strict=True) for load in _of_each(of, indices)]
        outcomes = dict(zip(order, _outcomes(ordered, logprobs, auxiliary, each), strict=True))
        return [outcomes[index] for index in range(len(microbatches))]


def _segment(microbatch: Microbatch, weights: Weights | None, dropout: DropoutKey | None = None) -> Segment:
    sequences = [torch.from_numpy(row.tokens.astype(np.int64)) for row in microbatch.rows]
    return Segment(sequences, weights, None if dropout is None else Drops(dropout))


def _loads(segment: Segment) -> Tensor | None:
    """Of the experts of each microbatch: int64 [J, layers, E]."""
    return torch.stack(list(segment.expert_loads.values()), 1) if segment.expert_loads else None


def _of_each(values_J: Tensor | None, microbatches: Sequence[int]) -> Sequence[Tensor | None]:
    return [None] * len(microbatches) if values_J is None else values_J.unbind()


def _loss(microbatches: Sequence[Microbatch]) -> Loss:
    names = {m.loss for m in microbatches}
    if unknown := names - LOSSES.keys():
        raise EngineError(f"unknown loss {sorted(unknown)}; take one of {', '.join(LOSSES)}")
    assert len(names) == 1
    return LOSSES[names.pop()]


def _targets(microbatches: Sequence[Microbatch], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(row of the pack that predicts, target id, weight), [N] each, of all targets of the pass."""
    rows, targets, weights = [], [], []
    start = 0
    for row in (row for m in microbatches for row in m.rows):
        rows.append(row.targets + start - 1)
        targets.append(row.tokens[row.targets])
        weights.append(row.weights)
        start += len(row.tokens)
    return (
        to_device(torch.from_numpy(np.concatenate(rows).astype(np.int64)), device),
        to_device(torch.from_numpy(np.concatenate(targets).astype(np.int64)), device),
        to_device(torch.from_numpy(np.concatenate(weights).astype(np.float64)), device),
    )


def _outcomes(
    microbatches: Sequence[Microbatch],
    logprobs: Tensor,
    auxiliary: Sequence[Tensor | None],
    loads: Sequence[Tensor | None],
) -> list[Outcome]:
    """What the pass came to: here, and not before, the CPU waits for a GPU."""
    counts = [len(row.targets) for m in microbatches for row in m.rows]
    by_row = iter(logprobs.cpu().split(counts))
    outcomes = []
    for m, aux, load in zip(microbatches, auxiliary, loads, strict=True):
        mine = [next(by_row) for _ in m.rows]
        loss = sum(
            float(LOSSES[m.loss](lp, torch.from_numpy(row.weights)).sum()) for lp, row in zip(mine, m.rows, strict=True)
        )
        outcomes.append(
            Outcome(mine, loss, None if aux is None else float(aux.detach()), None if load is None else load.cpu())
        )
    return outcomes
