"""Random numbers as pure functions of a key: nothing depends on what else was drawn, so nothing must be kept.

Draws are made on the CPU and are the same on every device; but for dropout a GPU draws by itself.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.loops import bits_of_double, compiled, double_of

Array = NDArray[Any]
_DRAWS = 256
"""Made at once, by a loop that vectorizes."""


def generator(*key: object) -> torch.Generator:
    """A fresh generator, seeded by a hash of the key."""
    return torch.Generator().manual_seed(_seed(key))


def _seed(key: tuple[object, ...]) -> int:
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")


@dataclass(frozen=True)
class DropoutKey:
    """One microbatch of one run: together with a layer and an input it names a mask (docs/design.md §3)."""

    seed: int
    step: int
    microbatch: int
    probability: float

    def fill_(self, mask: Tensor, layer: int) -> None:
        """Draws which elements of all inputs of a layer are dropped, on a GPU: bool [n, W].

        On the device, since the CPU's draws take longer than all that a GPU does with them.
        """
        device = mask.device if mask.device.type == "cuda" else "cpu"
        draw = torch.Generator(device).manual_seed(_seed((self.seed, self.step, self.microbatch, layer)))
        mask.bernoulli_(self.probability, generator=draw)

    def dropped(self, layer: int, sizes: Mapping[str, int]) -> Tensor:
        """Which elements of inputs that lie one after the other are dropped, each with the probability p.

        `sizes`: name of an input -> elements; the draws of each are its own. Returns them, int64, ascending.
        Drawn are the gaps between them, which are geometric: at p = 0.05 that is one draw for 20 elements. A draw
        and a comparison for each element cost as much as all matmuls of small rank.
        """
        keys = [_seed((self.seed, self.step, self.microbatch, layer, name)) for name in sizes]
        expected = sum(sizes.values()) * self.probability
        drops = np.empty(math.ceil(expected + 8 * math.sqrt(expected) + 16), np.int64)  # too few in one of 10^15 cases
        ends = np.cumsum(list(sizes.values()), dtype=np.int64)
        count = _drops(np.array(keys, np.uint64), ends, 1 / math.log1p(-self.probability), drops)
        return torch.from_numpy(drops[:count])


@compiled()
def _drops(keys: Array, ends: Array, scale: float, drops: Array) -> int:
    """Writes them, as many as there is room for, and returns how many they are."""
    gaps = np.empty(_DRAWS)
    count = start = 0
    for i in range(len(keys)):
        place, drawn = np.int64(start - 1), 0
        while place < ends[i]:
            _draw(keys[i], drawn, scale, ends[i] - start, gaps)
            drawn += _DRAWS
            for gap in gaps:
                place += 1 + np.int64(gap)
                if place >= ends[i] or count == len(drops):
                    place = ends[i]
                    break
                drops[count] = place
                count += 1
        start = ends[i]
    return count


@compiled()
def _draw(key: np.uint64, first: int, scale: float, most: int, gaps: Array) -> None:
    """⌊ln u / ln(1 - p)⌋ of draws `first` and on: u in (0, 1], by SplitMix64 (Steele, Lea and Flood 2014).

    A number's place in the sequence is all that its bits depend on, so that many are made at once. `scale` is
    1 / ln(1 - p). A gap is at most `most`: of the smallest p it, or the place behind it, would pass any integer.
    """
    for i in range(len(gaps)):
        bits = key + np.uint64(first + i + 1) * np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits ^= bits >> np.uint64(31)
        u = 2.0 - double_of((bits >> np.uint64(12)) | np.uint64(0x3FF0000000000000))
        gaps[i] = min(np.floor(_log(u) * scale), float(most))


@compiled()
def _log(x: float) -> float:
    """ln x of a normal number, to a unit in the last place (fdlibm, Sun Microsystems 1993); it vectorizes."""
    bits = bits_of_double(x)
    mantissa = double_of((bits & np.uint64(0x000FFFFFFFFFFFFF)) | np.uint64(0x3FF0000000000000))
    exponent = np.float64(np.int32(bits >> np.uint64(52)) - np.int32(1023))
    is_large = mantissa > 1.4142135623730951
    mantissa = 0.5 * mantissa if is_large else mantissa
    exponent = exponent + 1.0 if is_large else exponent
    f = mantissa - 1.0
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    even = w * (0.3999999999940941908 + w * (0.2222219843214978396 + w * 0.1531383769920937332))
    odd = z * (
        0.6666666666666735130 + w * (0.2857142874366239149 + w * (0.1818357216161805012 + w * 0.1479819860511658591))
    )
    half = 0.5 * f * f
    low = exponent * 1.90821492927058770002e-10
    return exponent * 6.93147180369123816490e-01 - ((half - (s * (half + even + odd) + low)) - f)
