"""Where slots lie, and what goes between places and cells, against plain loops over slots."""

from itertools import product

import pytest
import torch
from torch import Tensor

from engine import places

TOKENS, TOP_K, EXPERTS, MODULES, RANK = 37, 2, 5, 2, 3
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def layout() -> tuple[Tensor, Tensor, Tensor]:
    """Slots' experts [n, K], with nothing for the third, and their places among some of padding: slot <-> place."""
    scores = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0))
    scores[:, 2] = -1
    expert_nK = scores.topk(TOP_K).indices
    sizes_E = torch.bincount(expert_nK.flatten(), minlength=EXPERTS) + 4
    place_nK, slot_N = torch.empty_like(expert_nK), torch.full((int(sizes_E.sum()),), -1)
    places.sort(expert_nK, sizes_E.cumsum(0) - sizes_E, place_nK, slot_N)
    return expert_nK, place_nK, slot_N


def test_an_experts_slots_lie_one_after_the_other_in_their_order() -> None:
    expert_nK, place_nK, slot_N = layout()
    place, start = 0, 0
    for expert in range(EXPERTS):
        mine = [slot for slot, its in enumerate(expert_nK.flatten().tolist()) if its == expert]
        for place, slot in enumerate(mine, start):
            assert place_nK.flatten()[slot] == place
            assert slot_N[place] == slot
        start += len(mine) + 4
    assert int((slot_N == -1).sum()) == 4 * EXPERTS == len(slot_N) - TOKENS * TOP_K


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_go_to_their_cells_and_back_times_a_factor(dtype: torch.dtype) -> None:
    expert_nK, place_nK, slot_N = layout()
    precise = torch.promote_types(dtype, torch.float32)
    factor_nK = random(TOKENS, TOP_K, dtype=precise)
    low = random(MODULES, len(slot_N), RANK, dtype=dtype)
    cells = random(TOKENS, MODULES, EXPERTS, RANK, dtype=dtype)
    there, back, dots = cells.clone(), low.clone(), torch.empty_like(factor_nK)
    want_there, want_back, want_dots = cells.clone(), low.clone(), torch.zeros_like(factor_nK)
    for i, k, m in product(range(TOKENS), range(TOP_K), range(MODULES)):
        cell, place = (i, m, expert_nK[i, k]), (m, place_nK[i, k])
        want_there[cell] = (factor_nK[i, k] * low[place].to(precise)).to(dtype)
        want_back[place] = (factor_nK[i, k] * cells[cell].to(precise)).to(dtype)
        want_dots[i, k] += (cells[cell].to(precise) * low[place].to(precise)).sum()
    places.to_cells(low, place_nK, expert_nK, factor_nK, there)
    places.from_cells(cells, place_nK, expert_nK, factor_nK, back)
    places.dot(cells, low, place_nK, expert_nK, dots)
    assert torch.equal(there, want_there)
    assert torch.equal(back, want_back)
    torch.testing.assert_close(dots, want_dots)
    assert not torch.equal(there, cells)
    assert torch.equal(there[:, :, 2], cells[:, :, 2]), "no slot is its expert's"
    assert torch.equal(back[:, slot_N == -1], low[:, slot_N == -1]), "no slot has these places"
