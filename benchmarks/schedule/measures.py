"""What is measured while gangs go by."""

from collections import defaultdict
from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray


class ShareError:
    """How far the service of two tenants wanders apart, over the bound that docs/scheduling.md promises.

    For each pair and each interval in which both are backlogged and neither runs out inside a gang: the largest
    |ΔS_f/w_f − ΔS_g/w_g| of any part of the interval, ÷ (L/w_f + L/w_g).
    """

    def __init__(self, shares: Mapping[str, float], max_cost: int, num_places: int):
        self._shares = shares
        self._max_cost = max_cost
        self._slots: dict[str, int] = {}
        self._free = list(range(num_places))
        self._bound = np.ones((num_places, num_places))
        self._now, self._low, self._high = (np.zeros((num_places, num_places)) for _ in range(3))
        self._ended: list[NDArray[np.float64]] = []

    def add(self, costs: Mapping[str, int], backlogged: Collection[str], ran_out: Collection[str]) -> None:
        """A gang that served these costs to some of the backlogged."""
        for name in [name for name in self._slots if name not in backlogged]:
            self._end(name)
            self._free.append(self._slots.pop(name))
        for name in [name for name in backlogged if name not in self._slots]:
            self._begin(name)
        for name in ran_out:
            self._end(name)
        parts = np.zeros(len(self._now))
        for name, cost in costs.items():
            parts[self._slots[name]] = cost / self._shares[name]
        self._now += parts[:, None] - parts
        np.minimum(self._low, self._now, out=self._low)
        np.maximum(self._high, self._now, out=self._high)
        for name in ran_out:
            self._clear(self._slots[name])

    def ended(self) -> NDArray[np.float64]:
        """One number for each pair and interval."""
        for name in list(self._slots):
            self._end(name)
        return np.concatenate([*self._ended, np.zeros(0)])

    def _begin(self, name: str) -> None:
        slot = self._slots[name] = self._free.pop()
        self._clear(slot)
        for other, at in self._slots.items():
            bound = self._max_cost / self._shares[name] + self._max_cost / self._shares[other]
            self._bound[slot, at] = self._bound[at, slot] = bound

    def _end(self, name: str) -> None:
        slot = self._slots[name]
        others = [at for at in self._slots.values() if at != slot]
        self._ended.append(((self._high - self._low) / self._bound)[slot, others])
        self._clear(slot)

    def _clear(self, slot: int) -> None:
        for gap in (self._now, self._low, self._high):
            gap[slot, :] = gap[:, slot] = 0.0


class TimeShares:
    """The time that each tenant took, and its share of the time in which it had work."""

    def __init__(self, shares: Mapping[str, float]):
        self._shares = shares
        self._working: set[str] = set()
        self._total = 0.0
        self._clock = 0.0  # ∫ dt / shares of all that have work
        self._since: dict[str, float] = {}
        self.took: dict[str, float] = defaultdict(float)
        self.due: dict[str, float] = defaultdict(float)

    def begin(self, tenant: str) -> None:
        """It has work from now on."""
        if tenant not in self._working:
            self._working.add(tenant)
            self._total += self._shares[tenant]
            self._since[tenant] = self._clock

    def end(self, tenant: str) -> None:
        """It has none left."""
        self._working.remove(tenant)
        self._total -= self._shares[tenant]
        self.due[tenant] += self._shares[tenant] * (self._clock - self._since.pop(tenant))

    def add(self, takes: Mapping[str, float], duration: float) -> None:
        """A gang of this duration, of which these parts went to tenants."""
        for tenant, time in takes.items():
            self.took[tenant] += time
        self._clock += duration / self._total
