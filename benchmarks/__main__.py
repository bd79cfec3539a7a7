"""`python -m benchmarks NAME …` runs one benchmark; each prints its table and can write JSON."""

import os
import sys
from importlib import import_module

from engine import heap
from server.children import WAITING

NAMES = (
    "throughput",
    "sweep",
    "budget",
    "paper",
    "learning",
    "costs",
    "overhead",
    "estimates",
    "adversary",
    "plan",
    "schedule",
    "api",
    "soak",
    "recovery",
    "chaos",
    "memory",
    "memory_model",
    "recompute",
)


def main(arguments: list[str]) -> int:
    """Run the benchmark named first; the exit code."""
    if not arguments or arguments[0] not in NAMES:
        print(f"usage: python -m benchmarks {{{','.join(NAMES)}}} …", file=sys.stderr)
        return 2
    os.environ.update(WAITING)  # as in our server; read when torch is loaded
    os.environ["MALLOC_ARENA_MAX"] = "1"  # of the processes that a benchmark starts; and here:
    heap.keep_freed()
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    return import_module(f"benchmarks.{arguments[0]}").main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
