"""The pass under way: what every replaced module looks at, instead of a module global."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import local

import torch
from torch import Tensor

from engine.dropout import Dropped
from engine.segments import Batch, Segment


class Pass(local):
    """Handed to each replaced module at construction; `over` sets the batch for one forward and backward.

    Each thread has its own: passes may go side by side.
    """

    def __init__(self) -> None:
        self._batch: Batch | None = None
        self._dropped: dict[tuple[int, int, str], Dropped] = {}
        self.anchor = torch.zeros(())

    @property
    def batch(self) -> Batch:
        assert self._batch is not None, "the base model was called outside `Pass.over`"
        return self._batch

    @contextmanager
    def over(self, batch: Batch) -> Iterator[None]:
        assert self._batch is None, "a pass is already under way"
        self._batch = batch
        # Adapters' gradients are added by hand, in the backward of functions that autograd must visit even where
        # their input needs no gradient, as in the first layer: this scalar, given to each, makes it do so.
        self.anchor = torch.zeros((), requires_grad=torch.is_grad_enabled())
        try:
            yield
        finally:
            for segment in batch.segments:  # else a cycle through autograd's nodes keeps the pass in memory for ever
                segment.aux_losses.clear()
            self._batch = None
            self._dropped.clear()

    @contextmanager
    def resumed(self, batch: Batch) -> Iterator[None]:
        """A pass that another thread began: a GPU's backward has a thread of its own."""
        before = self._batch, self.anchor
        self._batch, self.anchor = batch, torch.zeros((), requires_grad=True)
        try:
            yield
        finally:
            self._batch, self.anchor = before
            self._dropped.clear()

    def dropped(self, x: Tensor, segment: Segment, layer: int, input_name: str) -> Dropped:
        """A segment's rows of an input after dropout: q, k and v of a layer ask for the same tensor."""
        key = (id(segment), layer, input_name)
        if key not in self._dropped:
            if any(other[1:] != key[1:] for other in self._dropped):
                self._dropped.clear()  # another layer or input: the last one's tensors are not asked for again
            self._dropped[key] = segment.drop(x, layer, input_name)
        return self._dropped[key]
