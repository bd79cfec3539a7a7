"""One matmul for all experts, as on a GPU, gives what the loop over their slices gives."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from engine import grouped
from engine.adapter import Parameter
from engine.dora import Magnitude
from engine.grouped import Groups, Slices, Together

RANK, WIDTH = 8, 24
LOADS = [5, 0, 9, 2, 0]
PLACES, EXPERTS = sum(LOADS), len(LOADS)
SLICES = Slices(0, LOADS)


@pytest.fixture(params=[False, True], ids=["one plain matmul", "torch's grouped matmul"])
def together(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Together:
    """torch's has no kernel on a CPU, but the same results."""
    monkeypatch.setattr(grouped, "has_kernel", lambda x, w: request.param)
    loads_E = torch.tensor(LOADS)
    return Together(torch.arange(EXPERTS).repeat_interleave(loads_E), loads_E)


LIKE = torch.empty(0)


def random(like: Tensor, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(like)


def weights(like: Tensor) -> Parameter:
    value = random(like, EXPERTS, RANK, WIDTH)
    return Parameter(value, value.float(), torch.ones_like(value, dtype=torch.float32))


def magnitudes(like: Tensor) -> list[Magnitude]:
    value = random(like, EXPERTS, WIDTH)
    m = Parameter(value, value.float(), torch.ones_like(value, dtype=torch.float32))
    return [Magnitude.of(m.unbound[expert], m.precise[expert].abs() + 1) for expert in range(EXPERTS)]


def added(groups: Groups, like: Tensor) -> Tensor:
    y = random(like, PLACES, WIDTH)
    groups.add_(y, random(like, PLACES, RANK), weights(like))
    return y


def widened(groups: Groups, like: Tensor) -> Tensor:
    return groups.widen(random(like, PLACES, RANK), weights(like))


def narrowed(groups: Groups, like: Tensor) -> Tensor:
    groups.narrow(random(like, PLACES, WIDTH), weights(like), out := like.new_empty(PLACES, RANK))
    assert torch.equal(groups.narrow(random(like, PLACES, WIDTH), weights(like)), out)
    return out


def accumulated(groups: Groups, like: Tensor) -> Tensor:
    parameter = weights(like)
    groups.accumulate(parameter, random(like, PLACES, RANK), random(like, PLACES, WIDTH))
    assert parameter.gradient is not None
    return parameter.gradient


def scaled(groups: Groups, like: Tensor) -> Tensor:
    groups.scale(random(like, PLACES, WIDTH), magnitudes(like), out := like.new_empty(PLACES, WIDTH))
    return out


def scaled_backward(groups: Groups, like: Tensor) -> Tensor:
    g, mine = random(like, PLACES, WIDTH), magnitudes(like)
    groups.scale_backward_(g, random(like, PLACES + 1, WIDTH)[1:], mine)
    return torch.cat([g.float(), torch.stack([magnitude.parameter.gradient for magnitude in mine])])


PRODUCTS = [added, widened, narrowed, accumulated, scaled, scaled_backward]


@pytest.mark.parametrize("product", PRODUCTS)
def test_products_are_those_of_the_loop(together: Together, product: Callable[[Groups, Tensor], Tensor]) -> None:
    torch.testing.assert_close(product(together, LIKE), product(SLICES, LIKE), rtol=1e-5, atol=1e-5)


def test_a_place_belongs_to_the_same_expert(together: Together) -> None:
    assert together.shares == SLICES.shares


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("product", [widened, narrowed, accumulated])
@pytest.mark.parametrize("slices", [SLICES, Slices(1, [7, PLACES - 7])], ids=["all experts", "some"])
def test_one_call_for_all_experts_has_the_bits_of_one_for_each(
    dtype: torch.dtype, product: Callable[[Groups, Tensor], Tensor], slices: Slices, monkeypatch: pytest.MonkeyPatch
) -> None:
    like, calls = torch.empty(0, dtype=dtype), []
    monkeypatch.setattr(grouped, "grouped_mm", lambda x, w, offs: calls.append(x) or grouped_mm(x, w, offs=offs))
    together = product(slices, like)
    assert calls
    calls.clear()
    monkeypatch.setattr(grouped, "has_kernel", lambda x, w: False)
    assert torch.equal(together, product(slices, like))
    assert not calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_it_has_them_at_a_real_width_on_any_number_of_threads(
    dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices, like = Slices(0, [64, 0, 16, 208, 32, 48, 16, 128]), torch.empty(0, dtype=dtype)
    w, low, x = random(like, 8, 16, 1536), random(like, 512, 16), random(like, 512, 1536)

    def products() -> list[Tensor]:
        parameter = Parameter(w, w.float(), torch.zeros_like(w, dtype=torch.float32))
        slices.accumulate(parameter, low, x)
        assert parameter.gradient is not None
        return [slices.widen(low, parameter), slices.narrow(x, parameter), parameter.gradient]

    together = products()
    torch.set_num_threads(1)
    monkeypatch.setattr(grouped, "has_kernel", lambda x, w: False)
    assert all(map(torch.equal, together, products()))
