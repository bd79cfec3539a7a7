"""Which rows a job trains on: a pure function of its seed and the step, for one data set and for several."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from server.curriculum import Mixture, apportion, order, permutation, rows_of_step, steps_per_epoch, tokens_of_steps

SKEWED = Mixture((10, 30, 5), (30, 10, 5))  # the first is gone through three times an epoch, the second in three epochs


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    """One to four sets, of each of which an epoch takes something."""
    num_rows = draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    weights = draw(st.lists(st.floats(0.05, 20), min_size=len(num_rows), max_size=len(num_rows)))
    epoch_rows = apportion(sum(num_rows), weights)
    assume(all(epoch_rows))
    return Mixture(tuple(num_rows), tuple(epoch_rows))


def epochs_of(mixture: Mixture, seed: int, count: int) -> list[int]:
    """The rows of so many epochs, one after another."""
    return list(chain.from_iterable(order(mixture, seed, epoch).tolist() for epoch in range(count)))


def test_a_single_set_is_shuffled_anew_each_epoch() -> None:
    for epoch in range(3):
        assert (order(Mixture.single(20), 7, epoch) == permutation(7, epoch, 20)).all()


def test_without_weights_sets_are_as_the_one_file_of_all_their_rows() -> None:
    pooled = Mixture((10, 30, 5), (10, 30, 5))
    assert epochs_of(pooled, 7, 3) == epochs_of(Mixture.single(45), 7, 3)


def test_an_epoch_takes_of_each_set_what_its_weight_says_in_an_order_of_chance() -> None:
    seen = set()
    for epoch in range(4):
        sets = np.searchsorted([10, 40], order(SKEWED, 7, epoch), side="right")
        assert np.bincount(sets).tolist() == [30, 10, 5]
        seen.add(tuple(sets))
    assert len(seen) == 4
    assert set(sets[:20]) == {0, 1, 2}


@given(mixtures(), st.integers(0, 2**63 - 1))
def test_no_row_of_a_set_comes_again_before_all_others_have_come(mixture: Mixture, seed: int) -> None:
    rows = np.array(epochs_of(mixture, seed, 5))
    for start, num_rows, epoch_rows in zip(mixture.starts, mixture.num_rows, mixture.epoch_rows, strict=True):
        counts = np.bincount(rows[(rows >= start) & (rows < start + num_rows)] - start, minlength=num_rows)
        assert counts.sum() == 5 * epoch_rows
        assert counts.max() - counts.min() <= 1


def test_a_set_is_gone_through_in_another_order_each_time() -> None:
    one, other = Mixture((4, 400), (200, 204)), order(Mixture((4, 400), (200, 204)), 7, 1)
    first = order(one, 7, 0)
    assert (order(one, 7, 0) == first).all()
    assert (order(one, 8, 0) != first).any()
    taken = [set(rows[rows >= 4].tolist()) for rows in (first, other)]
    assert taken[0] != set(range(4, 208)), "not the first rows of the file"
    assert len(taken[0] | taken[1]) == 400


@given(mixtures(), st.integers(1, 7), st.integers(0, 40))
def test_the_tokens_of_a_job_are_those_of_its_steps(mixture: Mixture, batch_size: int, total_steps: int) -> None:
    batch_size = min(batch_size, mixture.total)
    lengths = np.random.default_rng(5).integers(1, 50, mixture.total)
    steps = [rows_of_step(step, mixture=mixture, batch_size=batch_size, seed=7) for step in range(total_steps)]
    total = sum(int(lengths[rows].sum()) for rows in steps)
    assert tokens_of_steps(total_steps, mixture=mixture, lengths=lengths, batch_size=batch_size, seed=7) == total


def test_steps_cut_an_epoch_into_batches() -> None:
    steps = [rows_of_step(step, mixture=SKEWED, batch_size=8, seed=7).tolist() for step in range(12)]
    assert steps_per_epoch(SKEWED.total, 8) == 6
    assert [len(rows) for rows in steps] == [8, 8, 8, 8, 8, 5] * 2
    assert list(chain(*steps)) == epochs_of(SKEWED, 7, 2)


@pytest.mark.parametrize(
    ("total", "weights", "counts"),
    [
        (10, [1], [10]),
        (10, [3, 1], [8, 2]),  # 7.5 and 2.5: of equal remainders the earlier
        (10, [1, 1, 1], [4, 3, 3]),
        (45, [10, 30, 5], [10, 30, 5]),
        (45, [0.1, 0.3, 0.05], [10, 30, 5]),
        (10, [1e6, 1e-6], [10, 0]),
    ],
)
def test_rows_are_apportioned_by_largest_remainder(total: int, weights: list[float], counts: list[int]) -> None:
    assert apportion(total, weights) == counts


@given(st.integers(1, 10**6), st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8))
def test_what_is_apportioned_is_everything_and_less_than_a_row_from_what_the_weight_says(
    total: int, weights: list[float]
) -> None:
    counts = apportion(total, weights)
    assert sum(counts) == total
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - total * weight / sum(weights)) < 1 + 1e-6
