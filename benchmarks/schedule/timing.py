"""How long the engine takes, and what the scheduler charges: both from a report of `python -m benchmarks costs`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from scheduler.cost import Prices
from scheduler.snapshot import Microbatch

PASS_TOKENS = 17
"""What a pass takes beside its tokens, in tokens: of 320 rows it is 5 % (`fill_min`, DESIGN §3)."""


@dataclass(frozen=True)
class Unit:
    """An optimizer step or an evaluation: its microbatches, and how long each takes in token-equivalents."""

    microbatches: tuple[Microbatch, ...]
    takes: tuple[float, ...]


class Timing:
    """What the operations of each method take and cost. Time is in token-equivalents of the frozen base."""

    def __init__(self, report: dict[str, Any]):
        """`report` is the JSON of `benchmarks costs`."""
        self.seconds: float = report["seconds_per_token_equivalent"]
        self.prices = {method: Prices(**of_method) for method, of_method in report["prices"].items()}
        self._takes = {(row["method"], row["operation"]): float(row["takes"]) for row in report["rows"]}

    @property
    def methods(self) -> list[str]:
        return list(self.prices)

    def step(self, method: str, sizes: Sequence[int], *, checkpoint: bool = False) -> Unit:
        """Training on microbatches of so many tokens; the first is charged for the optimizer and the checkpoint."""
        prices = self.prices[method]
        cost = prices.optim_step() + (prices.save() if checkpoint else 0)
        takes = self._takes[method, "an optimizer step"]
        takes += self._takes[method, "a checkpoint"] if checkpoint else 0.0
        costs = [prices.forward_backward(size) for size in sizes]
        return self._unit(method, sizes, [costs[0] + cost, *costs[1:]], "trained", takes)

    def evaluation(self, method: str, sizes: Sequence[int]) -> Unit:
        """A forward over microbatches of so many tokens."""
        return self._unit(method, sizes, [self.prices[method].forward(size) for size in sizes], "evaluated", 0.0)

    def _unit(self, method: str, sizes: Sequence[int], costs: Iterable[int], done: str, once: float) -> Unit:
        token, microbatch = (self._takes[method, f"a {what} {done}"] for what in ("token", "microbatch"))
        takes = [size * token + microbatch for size in sizes]
        return Unit(
            microbatches=tuple(Microbatch(tokens=size, cost=cost) for size, cost in zip(sizes, costs, strict=True)),
            takes=(takes[0] + once, *takes[1:]),
        )
