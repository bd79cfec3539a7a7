"""A gate's activation and its derivative, the same bits on any number of threads (docs/design.md §3).

torch gives each thread a share of the elements, computes whole vectors of it at once and what is left of them another
way, which rounds differently. So elements go in pieces of which every share is whole vectors.
"""

import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation

_SHARE = 32768
"""Elements: torch gives a thread no fewer (`at::internal::GRAIN_SIZE`), but for GELU, which all threads share."""
_ALONE = 16384
"""Elements that no kernel shares."""
_VECTORS = 64
"""Elements: whole vectors on any processor, also where it takes two at a time."""


def forward(activation: nn.Module, x: Tensor) -> Tensor:
    """activation(x), of a contiguous x."""
    sizes = _pieces(x)
    if len(sizes) == 1:
        return activation(x)
    return torch.cat([activation(piece) for piece in x.view(-1).split(sizes)]).view_as(x)


def backward(activation: nn.Module, x: Tensor, gradient: Tensor, out: Tensor) -> Tensor:
    """gradient · activation'(x), written to `out`; all contiguous."""
    sizes = _pieces(x)
    if len(sizes) == 1:
        return _backward(activation, x, gradient, out)
    for piece in zip(*(tensor.view(-1).split(sizes) for tensor in (x, gradient, out)), strict=True):
        _backward(activation, *piece)
    return out


def _pieces(x: Tensor) -> list[int]:
    """Sizes of the pieces: first one that threads share in whole vectors, then those of one thread each."""
    size, threads, shares = x.numel(), torch.get_num_threads(), x.numel() // _SHARE
    if x.device.type != "cpu" or threads == 1 or size <= _ALONE:
        return [size]
    odd = threads // (threads & -threads)  # shares in multiples of it are whole vectors for all threads, too
    shared = size - size % (threads * _VECTORS) if shares >= threads else shares // odd * odd * _SHARE
    alone = size - shared
    return [piece for piece in (shared, *[_ALONE] * (alone // _ALONE), alone % _ALONE) if piece]


def _backward(activation: nn.Module, x: Tensor, gradient: Tensor, out: Tensor) -> Tensor:
    """By torch's own kernel: what autograd would ask for, without its graph."""
    match activation:
        case nn.SiLU() | SiLUActivation():
            return torch.ops.aten.silu_backward.grad_input(gradient, x, grad_input=out)
        case GELUTanh():
            return torch.ops.aten.gelu_backward.grad_input(gradient, x, approximate="tanh", grad_input=out)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        y = activation(leaf)
    return out.copy_(torch.autograd.grad(y, leaf, gradient)[0])
