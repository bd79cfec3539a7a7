"""Passes side by side on a CPU, each on threads of its own (docs/design.md §3).

Two threads make one pass about 1.5 times as fast, since an adapter's matmuls are too small to share, and two passes, on
a thread each, go at nearly twice the speed of one. How microbatches are spread changes no bit: the number of threads
does not (`engine.exactness`), nor does the company.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Lock, local
from typing import TypeVar

import torch

from engine.segments import FEWEST_ROWS

T = TypeVar("T")
LANE_TOKENS = 256
"""Fewer are not worth a lane: each reads all of the base's weights."""

Lane = list[int]
"""Which microbatches share a pass, ascending."""


def spread(sizes: Sequence[int], threads: int) -> list[Lane]:
    """Microbatches of so many tokens over lanes: the largest first, each to the lane with least (LPT; Graham 1969).

    All in one lane where one of them has so few that its bits depend on the number of threads.
    """
    most = min(threads, len(sizes), sum(sizes) // LANE_TOKENS) if min(sizes) >= FEWEST_ROWS else 1
    loads = [0] * max(1, most)
    lanes: list[Lane] = [[] for _ in loads]
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        lane = loads.index(min(loads))
        lanes[lane].append(index)
        loads[lane] += sizes[index]
    return [sorted(lane) for lane in lanes]


class _Crew:
    """The threads of lanes that start together: who is left takes those of who ended."""

    def __init__(self, threads: int, lanes: int):
        self.threads = threads
        self._lanes = lanes
        self._lock = Lock()

    def take_share(self) -> None:
        share = self.threads // self._lanes
        if torch.get_num_threads() != share:
            torch.set_num_threads(share)  # of this thread alone

    def leave(self) -> None:
        with self._lock:
            self._lanes -= 1


class _Mine(local):
    crew: _Crew | None = None


_mine = _Mine()


def take_share() -> None:
    """Asked for by each layer: as many threads as its lane may have by now."""
    if _mine.crew is not None:
        _mine.crew.take_share()


def side_by_side(work: Callable[[Lane], T], lanes: Sequence[Lane]) -> list[T]:
    """`work` of each lane, on the caller's threads.

    Raises:
        Exception: the first lane's that failed, once all have ended.
    """
    if len(lanes) == 1:
        return [work(lanes[0])]
    threads = torch.get_num_threads()
    crew = _Crew(threads, len(lanes))

    def run(lane: Lane) -> T:
        _mine.crew = crew
        take_share()
        try:
            return work(lane)
        finally:
            crew.leave()

    with ThreadPoolExecutor(len(lanes)) as pool:
        futures = [pool.submit(run, lane) for lane in lanes]
        wait(futures)
    torch.set_num_threads(threads)  # what threads begin with that are born later
    return [future.result() for future in futures]
