"""Sampling: many requests, each with its own adapter, advance together with their key/value caches kept.

Legend: n sequences of a pass, V vocabulary.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from engine.adapter import Adapter, Weights
from engine.base_model import BaseModel
from engine.cache import KeyValueCache
from engine.device import to_device
from engine.loss import CHUNK_ROWS
from engine.random import generator
from engine.run import Microbatch, Row
from engine.segments import Segment, pack

PREFILL_TOKENS = 4096
"""Most prompt tokens in one pass."""
DIVERGED = "diverged"
"""The finish reason of a sample whose adapter gives logits that are not numbers: nothing can be drawn."""


@dataclass
class Sample:
    """One sequence being sampled. `temperature` 0 takes the likeliest token."""

    prompt: list[int]
    max_tokens: int
    adapter: Adapter | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stop_tokens: frozenset[int] = frozenset()
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    cache: KeyValueCache | None = None

    def __post_init__(self) -> None:
        if self.max_tokens == 0:
            self.finish_reason = "length"
        self._generator = generator("sample", self.seed)

    def take(self, logits_V: Tensor) -> None:
        """Draw the next token from its logits (float32); the log-prob kept is the model's own, at temperature 1."""
        if not logits_V.isfinite().all():
            self.finish_reason = DIVERGED
            return
        logprobs_V = logits_V.log_softmax(-1)
        token = int(logits_V.argmax()) if self.temperature == 0 else self._draw(logits_V / self.temperature)
        self.tokens.append(token)
        self.logprobs.append(float(logprobs_V[token]))
        if token in self.stop_tokens:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.max_tokens:
            self.finish_reason = "length"

    def _draw(self, logits_V: Tensor) -> int:
        sorted_V, order_V = logits_V.sort(descending=True)
        if self.top_k is not None:
            sorted_V[self.top_k :] = -torch.inf
        probability_V = sorted_V.softmax(-1)
        if self.top_p is not None:
            before = probability_V.cumsum(-1) - probability_V  # the first token is always kept
            probability_V = probability_V.masked_fill(before >= self.top_p, 0)
        return int(order_V[torch.multinomial(probability_V, 1, generator=self._generator)])


@torch.no_grad()
def advance(base: BaseModel, samples: list[Sample], num_tokens: int) -> None:
    """Let each unfinished sample grow by up to `num_tokens` tokens; new ones are prefilled first."""
    adapters = {id(s.adapter): s.adapter for s in samples if s.adapter and not s.finish_reason}
    weights = {key: Weights.of(adapter, base.dtype) for key, adapter in adapters.items()}
    for group in _by_tokens([s for s in samples if s.cache is None and not s.finish_reason]):
        for sample in group:
            sample.cache = KeyValueCache(base.num_layers, len(sample.prompt) + sample.max_tokens)
        _step(base, weights, group, [sample.prompt for sample in group])
    for _ in range(num_tokens - 1):
        growing = [sample for sample in samples if not sample.finish_reason]
        if not growing:
            break
        _step(base, weights, growing, [sample.tokens[-1:] for sample in growing])
    for sample in samples:
        if sample.finish_reason:
            sample.cache = None


def scoring(prompt: list[int], adapter: Adapter | None) -> Microbatch:
    """A microbatch for `Engine.forward` that asks for the log-prob of every token of a prompt but the first."""
    tokens = np.array(prompt)
    row = Row(tokens, np.arange(1, len(tokens)), np.ones(len(tokens) - 1))
    return Microbatch(rows=[row], adapter=adapter)


def _by_tokens(samples: list[Sample]) -> list[list[Sample]]:
    groups: list[list[Sample]] = []
    room = -1
    for sample in samples:
        if len(sample.prompt) > room:
            groups.append([])
            room = PREFILL_TOKENS
        groups[-1].append(sample)
        room -= len(sample.prompt)
    return groups


def _step(base: BaseModel, weights: dict[int, Weights], samples: list[Sample], new_tokens: list[list[int]]) -> None:
    """Feed each sample its new tokens and let it draw the next one. Samples of one adapter ride as one segment."""
    by_adapter: dict[int, list[int]] = {}
    for index, sample in enumerate(samples):
        by_adapter.setdefault(id(sample.adapter), []).append(index)
    segments, order = [], []
    for adapter, indices in by_adapter.items():
        caches = [samples[i].cache for i in indices]
        segments.append(
            Segment(
                [torch.tensor(new_tokens[i]) for i in indices],
                weights.get(adapter),
                caches=[cache for cache in caches if cache is not None],
            )
        )
        order += indices
    batch = pack(segments, base.device)
    with base.pass_.over(batch):
        hidden = base.hidden_states(batch)
    lasts = to_device(torch.tensor(batch.lengths[:-1]).cumsum(0) - 1, base.device)
    for rows, indices in zip(lasts.split(CHUNK_ROWS), _chunks(order), strict=True):
        logits = base.head(hidden[rows]).float().cpu()
        for index, logits_V in zip(indices, logits, strict=True):
            samples[index].take(logits_V)
    for sample, tokens in zip(samples, new_tokens, strict=True):
        assert sample.cache is not None
        sample.cache.length += len(tokens)


def _chunks(order: list[int]) -> list[list[int]]:
    return [order[i : i + CHUNK_ROWS] for i in range(0, len(order), CHUNK_ROWS)]
