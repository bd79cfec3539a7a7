"""On a GPU, microbatches whose adapters have one config ride as one segment: J times the work at one launch each.

A GPU is done with a small job's matmul before the CPU has asked for the next, so the number of launches decides.
"""

from collections.abc import Sequence

from engine import device, grouped
from engine.adapter import Weights
from engine.base_model import BaseModel
from engine.dropout import Drops, Masks
from engine.rows import Rows
from engine.segments import Segment


def stacked(segments: Sequence[Segment], base: BaseModel) -> list[tuple[list[int], Segment]]:
    """What rides, each with the indices of the segments of one microbatch each that it is made of.

    Where a group of rows has no kernel (`grouped.kernel_for`), and beside magnitudes (DoRA), each rides by itself.
    """
    if device.may_look(base.device):
        return [([index], segment) for index, segment in enumerate(segments)]
    together: dict[object, list[int]] = {}
    for index, segment in enumerate(segments):
        weights = segment.weights
        key = weights.config if weights is not None and _can_be_stacked(weights) else index
        together.setdefault(key, []).append(index)
    return [(indices, _stack([segments[i] for i in indices], base)) for indices in together.values()]


def _can_be_stacked(weights: Weights) -> bool:
    has_kernel = grouped.kernel_for(weights.value.dtype, weights.value.device) and weights.layout.is_aligned
    return has_kernel and not weights.config.dora


def _stack(segments: Sequence[Segment], base: BaseModel) -> Segment:
    sizes = [segment.num_tokens for segment in segments]
    keys = [segment.dropout.key for segment in segments if isinstance(segment.dropout, Drops)]
    first = segments[0]
    if first.weights is None:
        return first
    dropout = Masks(keys, sizes, base.input_widths(first.weights.config), base.device) if keys else None
    if len(segments) == 1:
        return Segment(first.sequences, first.weights, dropout)
    return Segment(
        [sequence for segment in segments for sequence in segment.sequences],
        Weights.stacked([segment.weights for segment in segments if segment.weights is not None]),
        dropout,
        rows=Rows.of(sizes, base.device),
    )
