"""How slots are laid out for the experts."""

import pytest
import torch

from engine import router
from engine.router import route

TOKENS, WIDTH, EXPERTS, TOP_K = 600, 8, 6, 2


@pytest.mark.parametrize("block_rows", [1, 200, 10_000])
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_every_place_is_in_one_block_beside_its_own_expert(
    monkeypatch: pytest.MonkeyPatch, block_rows: int, threads: int
) -> None:
    """And there is one block where nobody could take another."""
    monkeypatch.setattr(router, "BLOCK_ROWS", block_rows)
    torch.manual_seed(0)
    routing, _ = route(torch.randn(TOKENS, WIDTH), torch.randn(EXPERTS, WIDTH), TOP_K)
    expert_of_place = {}
    assert (len(routing.blocks) > 1) == (threads > 1 and block_rows < 10_000)
    for block in routing.blocks:
        size = block.rows.stop - block.rows.start
        assert threads == 1 or len(block.groups.shares) == 1 or size <= block_rows
        for expert, rows in block.groups.shares:
            assert rows.stop <= size
            for place in range(block.rows.start + rows.start, block.rows.start + rows.stop):
                assert expert_of_place.setdefault(place, expert) == expert
    assert sorted(expert_of_place) == list(range(len(routing.token_N)))
    places = routing.place_nK.flatten().tolist()
    for slot, (expert, place) in enumerate(zip(routing.expert_nK.flatten().tolist(), places, strict=True)):
        assert expert_of_place[place] == expert
        assert (routing.slot_N[place], routing.token_N[place]) == (slot, slot // TOP_K)


def test_an_expert_without_a_token_has_no_share() -> None:
    weights = torch.zeros(EXPERTS, WIDTH)
    weights[1], weights[4] = 2.0, 1.0
    routing, _ = route(torch.ones(TOKENS, WIDTH), weights, TOP_K)
    assert {expert for block in routing.blocks for expert, _ in block.groups.shares} == {1, 4}
    assert routing.loads_E.tolist() == [0, TOKENS, 0, 0, TOKENS, 0]
