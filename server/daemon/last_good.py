"""What is left of a run whose numbers broke: the newest state that still gives finite ones. Knows no SQL."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engine.adapter import Adapter
from engine.engine import Engine
from engine.run import Microbatch

log = logging.getLogger("mixloom.daemon")


@dataclass(frozen=True)
class Candidate:
    """A state that a run has been in."""

    step: int
    load: Callable[[], Adapter]
    adapter_id: str | None = None  # where it is an adapter already


@dataclass(frozen=True)
class Good:
    """The one that was chosen."""

    step: int
    adapter: Adapter
    adapter_id: str | None


def last_good(engine: Engine, candidates: Sequence[Candidate], broke: Sequence[Microbatch]) -> Good | None:
    """The state of most steps whose weights are finite, and the loss with them on the rows that `broke`.

    Before the first step nothing has been learned: that is no state to keep. One that is an adapter already comes
    before the same state elsewhere. None if there is no such state.
    """
    for candidate in sorted(candidates, key=lambda one: (one.step, one.adapter_id is not None), reverse=True):
        if candidate.step == 0:
            continue
        try:
            adapter = candidate.load()
            if _is_good(engine, adapter, broke):
                return Good(candidate.step, adapter, candidate.adapter_id)
        except Exception:  # damaged files, no memory: another will do
            log.exception("state_unusable")
    return None


def _is_good(engine: Engine, adapter: Adapter, broke: Sequence[Microbatch]) -> bool:
    if not torch.isfinite(adapter.flat).all():
        return False
    alone = (engine.forward([Microbatch(rows=one.rows, adapter=adapter)]) for one in broke)
    return all(math.isfinite(outcome.loss) for (outcome,) in alone)
