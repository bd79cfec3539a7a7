"""Python's garbage collector, kept away from what a process loads once and never lets go of."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """Around the imports of a process: to look for garbage in them again and again takes a sixth of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def settle() -> None:
    """What is here now stays: no later collection walks through it."""
    gc.collect()
    gc.freeze()
