"""Prices in token-equivalents."""

from scheduler.cost import Prices

PRICES = Prices(
    base_parameters=100_000_000,
    adapter_parameters=20_000_000,
    dense_parameters=3_000_000,
    routed_parameters=1_000_000,
    modules=48,
)
BASE = Prices(base_parameters=100_000_000, adapter_parameters=0, dense_parameters=0, routed_parameters=0, modules=0)
MIXTURE = Prices(  # of SmolLM2-135M: rank 16, 8 experts, 2 for a token
    base_parameters=134_515_008,
    adapter_parameters=26_311_680,
    dense_parameters=1_981_440,
    routed_parameters=6_082_560,
    modules=840,
)


def test_a_trained_token_costs_the_base_and_the_part_of_the_adapter_that_it_meets():
    """1 + 4 × (3 + 2 × 1) / 100, and 48 modules at 8 a token."""
    assert PRICES.forward_backward(1000) == 1200 + 6
    assert BASE.forward_backward(1000) == 1000


def test_evaluation_costs_half_of_training():
    assert PRICES.forward(1000) == 600 + 3


def test_prices_are_rounded_up_so_that_nothing_is_free():
    assert PRICES.forward(1) == 1 + 3
    assert PRICES.forward_backward(1) == 2 + 6
    assert BASE.sample(1, num_sequences=100) == 2


def test_a_step_and_a_checkpoint_cost_by_the_whole_adapter():
    assert PRICES.optim_step() == 13
    assert PRICES.save() == 64


def test_many_tiny_batches_cost_more_than_one_large_batch_of_the_same_tokens():
    tiny = 100 * (MIXTURE.forward_backward(10) + MIXTURE.optim_step())
    assert tiny > 3 * (MIXTURE.forward_backward(1000) + MIXTURE.optim_step())


def test_sampled_tokens_share_the_price_of_their_pass():
    assert BASE.sample(10, num_sequences=1) == 10 * 41
    assert BASE.sample(10, num_sequences=16) == 35
