"""What a pass of the frozen base takes, measured: torch's own count of its allocations, in bytes.

What an adapter adds to it is arithmetic on its config, and the server's (`server/memory.py`).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile
from transformers.activations import ACT2FN

from engine import fused
from engine.base_model import BaseModel, input_gradient
from engine.loss import CHUNK_ROWS, LOSSES, target_logprobs
from engine.segments import Segment, pack

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler writes two lines to stderr each time otherwise


@dataclass(frozen=True)
class BaseMemory:
    """What a pass takes is affine in its tokens; a token's part is the slope between two passes."""

    weights: int
    kept_per_token: int  # from the forward until the backward, all layers
    backward_per_token: int  # besides, while the backward goes through a layer
    head: int  # besides what is kept, while the head computes its largest chunk
    recompute: bool  # whether what adapters keep is one layer's at a time, in the backward
    fused: bool  # whether there are loops for its feed-forward (`engine.fused`)


@dataclass(frozen=True)
class Allocations:
    """What a piece of work asked for: at most at once, and what of it was left when it ended."""

    peak: int
    left: int


def allocations(work: Callable[[], object], device: torch.device) -> Allocations:
    """Run `work` and count."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        peak = torch.cuda.max_memory_allocated(device)
        return Allocations(peak - before, torch.cuda.memory_allocated(device) - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    results = profiled.profiler.kineto_results
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda event: event.start_ns())
    peak = live = 0
    for event in events:
        live += event.nbytes()
        peak = max(peak, live)
    return Allocations(peak, live)


def measure(base: BaseModel) -> BaseMemory:
    """Two passes, of a half and of a whole chunk of the head."""
    sizes = CHUNK_ROWS // 2, CHUNK_ROWS
    half, whole = (_phases(base, size) for size in sizes)
    kept, backward = (round((whole[i] - half[i]) / (sizes[1] - sizes[0])) for i in (0, 2))
    weights = sum(parameter.nbytes for parameter in base.model.parameters())
    return BaseMemory(
        weights=weights,
        kept_per_token=kept,
        backward_per_token=backward,
        head=whole[1],
        recompute=base.recompute,
        fused=fused.takes(ACT2FN[base.activation_name], torch.empty(0, device=base.device)),
    )


def _phases(base: BaseModel, num_tokens: int) -> tuple[int, int, int]:
    """(kept for the backward, more than that by the head, by the backward) of one pass without an adapter."""
    batch = pack([Segment([torch.zeros(num_tokens, dtype=torch.int64)])], base.device)
    rows = torch.arange(num_tokens, device=base.device)
    made: list[torch.Tensor] = []  # what each phase leaves for the next

    def forward() -> None:
        made.append(base.hidden_states(batch))

    def head() -> None:
        weights = torch.ones(num_tokens, device=base.device)
        loss, _ = target_logprobs(made[0], base.head, rows, batch.tokens, weights, LOSSES["cross_entropy"])
        made.append(loss)

    def backward() -> None:
        made.pop().backward()

    with base.pass_.over(batch), input_gradient(base.model):
        forward_, head_, backward_ = (allocations(phase, base.device) for phase in (forward, head, backward))
    return forward_.left + head_.left, head_.peak, backward_.peak
