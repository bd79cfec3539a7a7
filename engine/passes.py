"""The pass under way: what every replaced module looks at, instead of a module global."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import local
from typing import Any, TypeVar

import torch

from engine.segments import Batch

T = TypeVar("T")


class Pass(local):
    """Handed to each replaced module at construction; `over` sets the batch for one forward and backward.

    Each thread has its own: passes may go side by side.
    """

    def __init__(self) -> None:
        self._batch: Batch | None = None
        self._shared: tuple[tuple[int, str], Any] | None = None
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
            self._batch = self._shared = None

    @contextmanager
    def resumed(self, batch: Batch) -> Iterator[None]:
        """A pass that another thread began: a GPU's backward has a thread of its own."""
        before = self._batch, self.anchor
        self._batch, self.anchor = batch, torch.zeros((), requires_grad=True)
        try:
            yield
        finally:
            self._batch, self.anchor = before
            self._shared = None

    def shared(self, input_: tuple[int, str], make: Callable[[], T]) -> T:
        """What the modules that read an input, (layer, name), have in common: made for the first that asks."""
        if self._shared is None or self._shared[0] != input_:
            self._shared = input_, make()  # those of the input before are not asked for again
        made: T = self._shared[1]
        return made
