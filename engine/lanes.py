"""A gang's passes on a CPU: a few at a time, side by side, each on threads of its own (docs/design.md §3).

Two threads make one pass 1.1 to 1.6 times as fast, since an adapter's matmuls are too small to share; two passes, on a
thread each, go at 1.7 to 1.9 times the speed of one. Passes that wait keep nothing, so a gang takes the memory of those
under way. How microbatches are spread changes no bit: the number of threads does not (`engine.exactness`), nor does the
company. Within a pass that has several threads, experts go side by side.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Lock, local
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")
PASS_TOKENS = 512
"""What a pass has at least where each lane has several: larger ones take memory and are hardly faster."""
LANE_TOKENS = 256
"""Fewer are not worth a lane: each pass reads all of the base's weights."""

SWITCH_SECONDS = 0.0005
"""How long a lane keeps Python's lock while another waits for it: at the usual 5 ms, short microbatches take a tenth
longer on two lanes (docs/log.md)."""

Riders = list[int]
"""Which microbatches share a pass, ascending."""


def hand_over_soon() -> None:
    """For the whole process."""
    sys.setswitchinterval(SWITCH_SECONDS)


def spread(sizes: Sequence[int], lanes: int, efforts: Sequence[int] | None = None) -> list[Riders]:
    """Microbatches of so many tokens over passes, as many for each lane, the longest first.

    `efforts` are how long each takes, in tokens of the base; else as long as it has tokens. The longest microbatch goes
    first, each to the pass with least (LPT; Graham 1969).
    """
    efforts = efforts or sizes
    lanes = max(1, min(lanes, sum(efforts) // LANE_TOKENS))
    loads = [0] * min(len(sizes), lanes * max(1, sum(sizes) // (lanes * PASS_TOKENS)))
    passes: list[Riders] = [[] for _ in loads]
    for index in sorted(range(len(sizes)), key=lambda i: -efforts[i]):
        least = loads.index(min(loads))
        passes[least].append(index)
        loads[least] += efforts[index]
    return [sorted(passes[i]) for i in sorted(range(len(loads)), key=lambda i: -loads[i])]


class _Crew:
    """The threads of passes that go through lanes: when fewer are left than lanes, they take the others' threads."""

    def __init__(self, threads: int, lanes: int, passes: int):
        self.threads = threads
        self._lanes = lanes
        self._passes = passes
        self._lock = Lock()

    def take_share(self) -> None:
        share = self.threads // min(self._lanes, self._passes)
        if torch.get_num_threads() != share:
            torch.set_num_threads(share)  # of this thread alone

    def leave(self) -> None:
        with self._lock:
            self._passes -= 1


class _Mine(local):
    crew: _Crew | None = None


_mine = _Mine()


def take_share() -> None:
    """Asked for by each layer: as many threads as its pass may have by now."""
    if _mine.crew is not None:
        _mine.crew.take_share()


def side_by_side(work: Callable[[Riders], T], passes: Sequence[Riders], lanes: int) -> list[T]:
    """`work` of each pass, so many at a time, on the caller's threads.

    Raises:
        Exception: the first pass's that failed, once all have ended.
    """
    if min(lanes, len(passes)) == 1:
        return [work(riders) for riders in passes]
    threads = torch.get_num_threads()
    crew = _Crew(threads, lanes, len(passes))

    def run(riders: Riders) -> T:
        _mine.crew = crew
        take_share()
        try:
            return work(riders)
        finally:
            crew.leave()

    with ThreadPoolExecutor(lanes) as pool:
        futures = [pool.submit(run, riders) for riders in passes]
        wait(futures)
    torch.set_num_threads(threads)  # what threads begin with that are born later
    return [future.result() for future in futures]


@contextmanager
def one_thread() -> Iterator[None]:
    """For what is too small to be shared, and whose bits would depend on how."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


_helpers = ThreadPoolExecutor(256, thread_name_prefix="helper")  # each is born when there is work for it


@torch.no_grad()
def on_all_threads(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`work` of each item, none of which writes where another reads, on the threads that the caller has, one each.

    For what is too small for several threads together. No gradient is recorded.

    Raises:
        Exception: the caller's own, or the first helper's, once all have ended.
    """
    threads = torch.get_num_threads()
    if min(threads, len(items)) == 1:
        return [work(item) for item in items]
    made: dict[int, R] = {}
    left = deque(enumerate(items))

    @torch.no_grad()  # of this thread alone, as is the number of threads
    def take() -> None:
        torch.set_num_threads(1)
        while True:
            try:
                index, item = left.popleft()
            except IndexError:
                return
            made[index] = work(item)

    helpers = [_helpers.submit(take) for _ in range(min(threads, len(items)) - 1)]
    try:
        take()
    finally:
        started = [helper for helper in helpers if not helper.cancel()]
        wait(started)
        torch.set_num_threads(threads)  # and what threads begin with that are born later
    for helper in started:
        helper.result()
    return [made[index] for index in range(len(items))]
