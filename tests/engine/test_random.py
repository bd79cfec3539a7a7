"""Dropout masks are pure functions of their key: the right rate, the right scale, and nothing shared."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.random import DropoutKey, _log, generator

KEY = DropoutKey(seed=1, step=2, microbatch=3, probability=0.1)
SIZE = 400_000
GOLDEN = [2, 17, 22, 37, 39, 48, 55]


def dropped(key: DropoutKey = KEY, layer: int = 4, input_name: str = "mlp_input") -> torch.Tensor:
    """bool [SIZE]: which elements are dropped."""
    drops = key.dropped(layer, {input_name: SIZE})
    return torch.zeros(SIZE, dtype=torch.bool).index_fill(0, drops, True)


@pytest.mark.parametrize("probability", [0.001, 0.05, 0.1, 0.5, 0.9])
def test_elements_are_dropped_at_the_rate_asked_for(probability: float) -> None:
    """Within 4 standard deviations; in each part, as well: the first and the last draw are like any other."""
    whole = dropped(replace(KEY, probability=probability))
    for part in (whole, *whole.chunk(8)):
        deviation = (probability * (1 - probability) / len(part)) ** 0.5
        assert float(part.double().mean()) == pytest.approx(probability, abs=4 * deviation)


def test_drops_are_ascending_and_within_the_input() -> None:
    for size in (1, 2, 15, 400):
        for seed in range(50):
            drops = replace(KEY, seed=seed, probability=0.4).dropped(0, {"x": size})
            assert drops.dtype is torch.int64
            assert drops.diff().gt(0).all()
            assert drops.ge(0).all()
            assert drops.lt(size).all()


@pytest.mark.parametrize("probability", [1e-17, 1e-18, 1e-19, 5e-324])
def test_the_smallest_rates_drop_next_to_nothing_and_no_element_that_there_is_not(probability: float) -> None:
    """Their gaps are larger than any integer."""
    for seed in range(50):
        assert DropoutKey(seed, 1, 1, probability).dropped(0, {"x": 1000}).tolist() == []


def test_the_first_and_the_last_element_are_dropped_as_often_as_any() -> None:
    masks = [replace(KEY, seed=seed, probability=0.3).dropped(0, {"x": 5}) for seed in range(2000)]
    counts = torch.cat(masks).bincount(minlength=5)
    assert counts.numpy() == pytest.approx(600, abs=4 * (2000 * 0.3 * 0.7) ** 0.5)


def test_neighbouring_elements_are_independent() -> None:
    values = dropped(replace(KEY, probability=0.5)).double()
    for distance in (1, 2, 3, 4, 400):
        both = float((values[:-distance] * values[distance:]).mean())
        assert both == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / SIZE) ** 0.5)


def test_the_same_key_gives_the_same_mask_whatever_was_drawn_between() -> None:
    first = dropped()
    torch.manual_seed(0)
    dropped(replace(KEY, seed=99))
    state = torch.get_rng_state()
    assert torch.equal(dropped(), first)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"


@pytest.mark.parametrize(
    "other",
    [
        {"key": replace(KEY, seed=2)},
        {"key": replace(KEY, step=3)},
        {"key": replace(KEY, microbatch=4)},
        {"key": replace(KEY, step=3, microbatch=2)},
        {"layer": 5},
        {"input_name": "down_input.0"},
    ],
    ids=str,
)
def test_every_part_of_the_key_gives_another_mask(other: dict) -> None:
    """Unrelated: two masks drop the same element as often as chance says."""
    assert float((dropped() & dropped(**other)).double().mean()) == pytest.approx(0.01, abs=0.001)


@pytest.mark.parametrize("probability", [1e-9, 1 - 1e-4, 1 - 1e-9])
def test_rates_near_none_and_near_all_are_kept(probability: float) -> None:
    assert float(dropped(replace(KEY, probability=probability)).double().mean()) == pytest.approx(probability, abs=1e-3)


def test_the_draws_stay_the_same_from_version_to_version() -> None:
    """A run that goes on under a version that draws otherwise would be another run: this test would say so."""
    assert replace(KEY, probability=0.1).dropped(4, {"mlp_input": 60}).tolist() == GOLDEN


def gaps(key: tuple[object, ...], probability: float) -> Iterator[int]:
    """SplitMix64 and the inverse of the geometric distribution, in Python's integers."""
    state = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        bits = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
        bits ^= bits >> 31
        yield math.floor(math.log(1 - (bits >> 12) / 2**52) / math.log1p(-probability))


@pytest.mark.parametrize("probability", [0.001, 0.05, 0.5, 0.999])
def test_places_are_those_of_the_formula_for_each_input_by_itself(probability: float) -> None:
    sizes, wanted, start = {"x": 5000, "y": 1, "z": 3000}, [], 0
    for name, size in sizes.items():
        drawn, place = gaps((1, 2, 3, 4, name), probability), -1
        while (place := place + 1 + next(drawn)) < size:
            wanted.append(start + place)
        start += size
    got = replace(KEY, probability=probability).dropped(4, sizes).tolist()
    assert got == wanted
    assert len(got) > 3


def test_a_logarithm_is_right_to_two_units_in_the_last_place() -> None:
    """Over the range of the draws, also at its ends."""
    steps = np.arange(1, 2**52, 2**52 // 20_011)
    draws = np.concatenate([steps, 2**52 - 2.0 ** np.arange(52), 2.0 ** np.arange(53)]) / 2**52
    logarithms = np.array([_log(draw) for draw in draws])
    np.testing.assert_array_max_ulp(logarithms, np.log(draws), 2)


def test_a_generator_depends_on_its_whole_key() -> None:
    keys = [(), ("a",), ("a", 1), ("a", "1"), (1, "a"), ("a1",)]
    draws = [int(torch.randint(2**60, (), generator=generator(*key))) for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws[2] == int(torch.randint(2**60, (), generator=generator("a", 1)))


def test_a_gpus_mask_is_drawn_again_from_its_key_and_from_no_other() -> None:
    masks = [torch.empty(300, 200, dtype=torch.bool) for _ in range(4)]
    for mask, key, layer in zip(masks, (KEY, KEY, KEY, replace(KEY, step=9)), (0, 0, 1, 0), strict=True):
        key.fill_(mask, layer)
    assert torch.equal(masks[0], masks[1])
    for mask in masks[2:]:
        assert float((masks[0] & mask).float().mean()) == pytest.approx(KEY.probability**2, abs=0.003)
    assert all(float(mask.float().mean()) == pytest.approx(KEY.probability, abs=0.005) for mask in masks)
