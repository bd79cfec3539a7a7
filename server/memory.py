"""The bytes of a run and of a pass, before they are there: arithmetic on its config and on what the base published.

Of the base `engine.memory` has measured what a pass takes; of an adapter follows here what `engine.{lora,dora,
experts,feed_forward,router}` keep of a segment for the backward (of all layers, or with `recompute` of one), and what
the backward of a feed-forward makes.
`python -m benchmarks memory_model` holds it against what passes take.

Legend: n a segment's tokens, N its slots sorted by expert, m those of a block, D hidden, F feed-forward width,
K active experts, E experts, R rank, O a module's output width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from server.db.tables import Base
from server.resolve import FEED_FORWARD, TRAINING_BYTES_PER_PARAMETER, num_parameters

FLOAT32 = 4
INT64 = 8
RECOVERY_BYTES_PER_PARAMETER = 3 * FLOAT32
"""Of a recovery point: weight and two moments; it lies between optimizer steps, where the gradient is 0."""
ROW_MULTIPLE = 16
BLOCK_ROWS = 256
CHUNK_ROWS = 256
"""As in `engine.segments`, `engine.router` and `engine.loss`."""
_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}
_SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True, kw_only=True)
class Part:
    """One run's microbatches in a pass."""

    adapter: dict[str, Any]  # resolved
    microbatches: Sequence[int]  # tokens of each


def resident_bytes(adapter: dict[str, Any], base: Base) -> int:
    """As long as the run is in memory; its weights in the base's dtype are there while it rides in a pass."""
    cast = _BYTES[base.dtype] if _BYTES[base.dtype] < FLOAT32 else 0
    return (TRAINING_BYTES_PER_PARAMETER + cast) * num_parameters(adapter, base)


def recovery_bytes(adapter: dict[str, Any], base: Base) -> int:
    """Of a recovery point: of its file, and of the copy in memory that is written."""
    return RECOVERY_BYTES_PER_PARAMETER * num_parameters(adapter, base)


def head_bytes(base: Base) -> int:
    """Of the head's largest chunk, whatever the size of a pass."""
    return int(_measured(base)["head"])


def token_bytes(adapter: dict[str, Any], base: Base) -> int:
    """Of each token of a pass in which the run has one microbatch after another, each as large as it may be."""
    size = base.microbatch_tokens
    segment = _Segment(adapter, base, size)
    beside = sum(_beside([segment], base)) + _gradient(adapter, base) + _stacked(adapter, base)
    return _measured(base)["kept_per_token"] + math.ceil(beside / size)


def pass_bytes(parts: Sequence[Part], base: Base) -> int:
    """The most at once of a training pass, besides the base and the resident runs.

    It is while the head computes, or in the backward of the last layer's feed-forward. A run's second microbatch,
    and each after it, has a gradient of its own until the pass ends.
    """
    segments = [_Segment(part.adapter, base, size) for part in parts for size in part.microbatches]
    kept, backward = _beside(segments, base)
    kept += _measured(base)["kept_per_token"] * _num_tokens(segments)
    gradients = sum(_gradient(part.adapter, base) * (len(part.microbatches) - 1) for part in parts)
    gradients += sum(_stacked(part.adapter, base) * len(part.microbatches) for part in parts)
    head = head_bytes(base) * min(CHUNK_ROWS, _num_tokens(segments)) // CHUNK_ROWS
    return kept + gradients + max(head, backward)


class _Segment:
    """One microbatch in a pass, and what it takes beside what as many tokens of the bare base do."""

    def __init__(self, adapter: dict[str, Any], base: Base, num_tokens: int):
        self.base = base
        self.num_tokens = num_tokens
        self.dora, self.dropout, self.rank = adapter["dora"], adapter["dropout"], adapter["rank"]
        self.is_mixture = adapter["method"] == "mixlora"
        self.top_k, self.num_experts = adapter["top_k"] or 0, adapter["num_experts"] or 0
        inside = FEED_FORWARD if self.is_mixture else ()
        self.lora = [target for target in adapter["target_modules"] if target not in inside]
        self.experts = [target for target in adapter["target_modules"] if target in inside]
        self.size = _BYTES[base.dtype]
        self.width, self.hidden = base.targets["gate_proj"]
        self.slots = num_tokens * self.top_k + self.num_experts * (ROW_MULTIPLE - 1) // 2  # half of the padding
        self.splits_down = self.dora and "down_proj" in self.experts

    def reads(self, modules: Sequence[str]) -> bool:
        """Whether its adapter keeps the input that these modules share; a router reads that of gate and up."""
        return bool(set(modules) & set(self.lora)) or (self.is_mixture and "gate_proj" in modules)

    def keeps_pack(self, modules: Sequence[str]) -> bool:
        """Whether it keeps that by a view, with the rows of all others: what dropout leaves is a copy."""
        by_router = self.is_mixture and "gate_proj" in modules and self.size >= FLOAT32
        return self.reads(modules) and (by_router or not self.dropout)

    def dropped(self, rows: int, width: int) -> int:
        """What dropout left of an input, and which elements it dropped."""
        drops = rows * width * self.dropout
        drawn = drops + 8 * math.sqrt(drops) + 16 if drops else 0  # as `engine.random` draws them
        return rows * width * self.size + int(drawn) * INT64

    def kept(self) -> int:
        """In one layer from the forward until the backward, besides inputs."""
        n, total = self.num_tokens, 0
        for module in self.lora:
            out_width = self.base.targets[module][0]
            total += n * self.rank * self.size  # s·Ax
            if self.dora:
                total += n * out_width * self.size + 2 * out_width * FLOAT32  # z; norm and factor
        return total + (self._experts_kept() if self.is_mixture else 0)

    def waiting(self) -> int:
        """In the backward of a feed-forward, until its turn comes: gradients at what its experts gave."""
        if "down_proj" not in self.experts:
            return 0
        if self.splits_down:
            return self.slots * self.width * self.size  # at h
        return self.num_tokens * self.num_experts * self.rank * self.size  # at what goes through B

    def working(self) -> int:
        """While it has its turn there."""
        if not self.is_mixture:  # the product that a magnitude's gradient is the sum of
            return self.num_tokens * self.width * FLOAT32 if self.dora and set(self.lora) & set(FEED_FORWARD) else 0
        cells = self.num_experts * self.rank
        end = max(self.num_tokens + self.hidden, self.width) * cells  # gradients: at A's output and at A, or at B
        threads = 1 if self.base.fingerprint["device"] == "cuda" else self.base.fingerprint["threads"]
        # of a base that an older version has published nothing is said of loops
        if _measured(self.base).get("fused") and not self.dora and set(self.experts) == set(FEED_FORWARD):
            tensors = 3 if threads == 1 else 4  # gate, up and dropout(h); one of them both whole and in blocks
            end = 2 * ((self.num_tokens + self.hidden) * cells + 2 * self.slots * self.rank)  # A of gate and up is one
            end = max(end, self.width * cells)
            return (tensors * self.slots * self.width + end) * self.size
        copies = 0 if self.size == FLOAT32 else FLOAT32 // self.size  # in float32, of what is summed
        tensors = 2 + copies // 2 if self.splits_down else 4 + copies  # of a block: gate, up, act(gate)·up, product
        if self.dora:
            tensors += len(set(self.experts) & {"gate_proj", "up_proj"})  # what a magnitude scales
        block = max(BLOCK_ROWS, self.num_tokens)  # an expert that every token takes
        at_once = self.slots if threads == 1 else min(self.slots, block * threads)
        at_gate_and_up = 2 * self.slots * self.width  # the gradients there; up's is made where act(gate) was
        return (at_gate_and_up + tensors * at_once * self.width + end) * self.size

    def _experts_kept(self) -> int:
        n, slots = self.num_tokens, self.slots
        total = n * (FLOAT32 * (self.num_experts + 1) + self.top_k * (3 * FLOAT32 + 2 * INT64))  # the routing by slot
        total += slots * (FLOAT32 + 2 * INT64)  # and by place
        if self.size < FLOAT32:
            total += n * self.hidden * FLOAT32  # x as the router reads it
        for module in self.experts:
            out_width = self.base.targets[module][0]
            if self.dora:
                total += 2 * self.num_experts * out_width * FLOAT32
            if module != "down_proj":
                total += slots * self.rank * self.size  # s·Ax
            elif self.splits_down:
                total += self.dropped(slots, self.width)  # h
                total += slots * (self.rank + 2 * out_width) * self.size  # s·Ah; W2 h + …, before and after m
            else:
                total += (slots + n * self.num_experts) * self.rank * self.size  # s·Ah by place and by cell
                total += int(slots * self.width * self.dropout) * INT64
        return total


def _beside(segments: Sequence[_Segment], base: Base) -> tuple[int, int]:
    """Besides what the base keeps: (from the forward until the backward, at the largest moment of the backward)."""
    kept, backward = _kept(segments, base), _backward(segments, base)
    return (0, kept + backward) if _measured(base)["recompute"] else (base.num_layers * kept, backward)


def _kept(segments: Sequence[_Segment], base: Base) -> int:
    """Of one layer from its forward until its backward, besides what the base keeps."""
    layer = sum(segment.kept() for segment in segments)
    for modules in _SHARED_INPUTS:
        width = base.targets[modules[0]][1]
        if any(segment.keeps_pack(modules) for segment in segments):
            layer += _num_tokens(segments) * width * _BYTES[base.dtype]
        copies = [segment for segment in segments if segment.reads(modules) and segment.dropout]
        layer += sum(segment.dropped(segment.num_tokens, width) for segment in copies)
    return layer


def _backward(segments: Sequence[_Segment], base: Base) -> int:
    """At its largest moment, in the last layer's feed-forward, besides what layers keep: segments take turns there."""
    shared = _measured(base)["backward_per_token"]
    waiting = sum(segment.waiting() for segment in segments)
    return shared * _num_tokens(segments) + waiting + max(segment.working() for segment in segments)


def _num_tokens(segments: Sequence[_Segment]) -> int:
    return sum(segment.num_tokens for segment in segments)


def _gradient(adapter: dict[str, Any], base: Base) -> int:
    return FLOAT32 * num_parameters(adapter, base)


def _stacked(adapter: dict[str, Any], base: Base) -> int:
    """On CUDA, the copies of a microbatch's weights, and the gradient, that ride in a stack (`engine.stacks`)."""
    if base.fingerprint["device"] != "cuda" or adapter["dora"]:
        return 0
    return (2 * FLOAT32 + _BYTES[base.dtype]) * num_parameters(adapter, base)


def _measured(base: Base) -> dict[str, Any]:
    assert base.memory is not None, "the base was published by an older version; each start of a daemon publishes anew"
    return base.memory
