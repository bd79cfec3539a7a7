"""Dropout masks are pure functions of their key: the right rate, the right scale, and nothing shared."""

from dataclasses import replace

import pytest
import torch

from engine.random import DropoutKey, generator

KEY = DropoutKey(seed=1, step=2, microbatch=3, probability=0.1)
SHAPE = (1000, 400)


def mask(key: DropoutKey = KEY, layer: int = 4, input_name: str = "mlp_input", **like: torch.dtype) -> torch.Tensor:
    return key.mask(layer, input_name, torch.empty(SHAPE, **like))


@pytest.mark.parametrize("probability", [0.001, 0.05, 0.1, 0.5, 0.9])
def test_elements_are_dropped_at_the_rate_asked_for(probability: float) -> None:
    """Within 4 standard deviations and the 1 in 65,536 of its resolution, in each of the four parts of a draw too."""
    dropped = mask(replace(KEY, probability=probability)).flatten() == 0
    for part in (dropped, *(dropped[lane::4] for lane in range(4))):
        deviation = (probability * (1 - probability) / len(part)) ** 0.5
        assert float(part.double().mean()) == pytest.approx(probability, abs=4 * deviation + 1 / 65536)


@pytest.mark.parametrize("probability", [0.001, 0.05, 0.1, 0.5, 0.9])
def test_what_is_kept_is_scaled_so_that_the_mean_stays(probability: float) -> None:
    """The scale is that of the rate in force, so that nothing is biased by its resolution."""
    values = mask(replace(KEY, probability=probability), dtype=torch.float64)
    (scale,) = set(values.unique().tolist()) - {0.0}
    assert scale == pytest.approx(1 / (1 - round(probability * 65536) / 65536), rel=1e-12)
    deviation = (probability / (1 - probability) / values.numel()) ** 0.5
    assert float(values.mean()) == pytest.approx(1, abs=4 * deviation)


def test_neighbouring_elements_are_independent() -> None:
    dropped = (mask(replace(KEY, probability=0.5)).flatten() == 0).double()
    for distance in (1, 2, 3, 4, SHAPE[1]):
        both = float((dropped[:-distance] * dropped[distance:]).mean())
        assert both == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / dropped.numel()) ** 0.5)


def test_the_same_key_gives_the_same_mask_whatever_was_drawn_between() -> None:
    first = mask()
    torch.manual_seed(0)
    mask(replace(KEY, seed=99))
    assert torch.equal(mask(), first)
    state = torch.get_rng_state()
    mask()
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
    one, two = (m.flatten() == 0 for m in (mask(), mask(**other)))
    assert float((one & two).double().mean()) == pytest.approx(0.01, abs=0.001)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_is_dropped_does_not_depend_on_the_dtype(dtype: torch.dtype) -> None:
    assert mask(dtype=dtype).dtype is dtype
    assert torch.equal(mask(dtype=dtype) == 0, mask() == 0)


@pytest.mark.parametrize("probability", [1e-9, 1 - 1e-4, 1 - 1e-9])
def test_rates_near_none_and_near_all_are_finite(probability: float) -> None:
    values = mask(replace(KEY, probability=probability))
    assert values.isfinite().all()
    assert float((values == 0).double().mean()) == pytest.approx(probability, abs=1e-3)


def test_a_generator_depends_on_its_whole_key() -> None:
    keys = [(), ("a",), ("a", 1), ("a", "1"), (1, "a"), ("a1",)]
    draws = [int(torch.randint(2**60, (), generator=generator(*key))) for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws[2] == int(torch.randint(2**60, (), generator=generator("a", 1)))
