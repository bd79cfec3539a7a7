"""An activation's bits do not depend on the number of threads."""

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation

from engine import activation

ROWS = (0, 1, 21, 22, 106, 313, 640)


def both(act: nn.Module, x: Tensor, gradient: Tensor) -> list[Tensor]:
    return [
        activation.forward(act, x, out=torch.empty_like(x)),
        activation.backward(act, x, gradient, out=torch.empty_like(x)),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", [SiLUActivation(), GELUTanh(), nn.GELU()], ids=lambda act: type(act).__name__)
@pytest.mark.parametrize("width", [1520, 1013])
def test_bits_are_those_of_one_thread(act: nn.Module, dtype: torch.dtype, width: int, threads: int) -> None:
    draw = torch.Generator().manual_seed(0)
    for rows in ROWS:
        x, gradient = (torch.randn(rows, width, generator=draw).to(dtype) for _ in range(2))
        shared = both(act, x, gradient)
        torch.set_num_threads(1)
        assert all(map(torch.equal, shared, both(act, x, gradient))), rows
        assert torch.equal(shared[0], act(x)), rows
        torch.set_num_threads(threads)
