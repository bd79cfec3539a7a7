"""A contender of others in a process of its own, as its users start it: under torch's defaults.

In the benchmark's own process threads wait asleep, as the server's do, and MKL is in the engine's mode. Who has the
machine alone is faster with threads that spin while they wait, which is what a script gets.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

from benchmarks import machine
from benchmarks.bases import Bases
from benchmarks.contenders import CONTENDERS, Contender
from benchmarks.data import Step


class Apart:
    """The contender of that name; its process ends with this one."""

    def __init__(self, name: str, bases: Bases):
        self.process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        with machine.defaults():
            self.trainable_parameters = self.process.submit(_make, name, replace(bases)).result()

    def step(self, step: Step) -> float:
        return self.process.submit(_step, step).result()


_made: list[Contender] = []


def _make(name: str, bases: Bases) -> int:
    _made.append(CONTENDERS[name](bases))
    return _made[0].trainable_parameters


def _step(step: Step) -> float:
    return _made[0].step(step)
