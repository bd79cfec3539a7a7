"""Prices in token-equivalents."""

from scheduler.cost import Prices

PRICES = Prices(base_parameters=100_000_000, adapter_parameters=20_000_000, active_parameters=5_000_000, modules=64)
BASE = Prices(base_parameters=100_000_000, adapter_parameters=0, active_parameters=0, modules=0)


def test_a_trained_token_costs_the_base_and_the_part_of_the_adapter_that_it_meets():
    """1 + 4 × 5 / 100, and 64 modules at 32 a token."""
    assert PRICES.forward_backward(1000) == 1200 + 2
    assert BASE.forward_backward(1000) == 1000


def test_evaluation_costs_half_of_training():
    assert PRICES.forward(1000) == 600 + 1


def test_prices_are_rounded_up_so_that_nothing_is_free():
    assert PRICES.forward(1) == 1 + 1
    assert PRICES.forward_backward(1) == 2 + 2
    assert BASE.sample(1, num_sequences=100) == 2


def test_a_step_and_a_checkpoint_cost_by_the_whole_adapter():
    assert PRICES.optim_step() == 26
    assert PRICES.save() == 13


def test_many_tiny_batches_cost_more_than_one_large_batch_of_the_same_tokens():
    tiny = 100 * (PRICES.forward_backward(10) + PRICES.optim_step())
    assert tiny > 3 * (PRICES.forward_backward(1000) + PRICES.optim_step())


def test_sampled_tokens_share_the_price_of_their_pass():
    assert BASE.sample(10, num_sequences=1) == 10 * 17
    assert BASE.sample(10, num_sequences=16) == 10 * 2
