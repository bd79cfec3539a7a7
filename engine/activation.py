"""A gate's activation and its derivative, the same bits on any number of threads (docs/design.md §3).

torch gives each thread a share of the elements, computes whole vectors of it at once and what is left of them another
way, which rounds differently. So elements go in pieces of which every share is whole vectors. How it shares n elements
among T threads: each gets a T-th, but with fewer than T x 32,768 only so many threads get any that each has 32,768 at
most; with GELU all T do above 16,384. One with another rule may not keep its bits, which `engine.exactness` tries.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation

from engine import fused

_GRAIN = 32768
"""Elements (`at::internal::GRAIN_SIZE`)."""
_ALONE = 16384
"""Elements that one thread computes, by either rule."""
_VECTORS = 64
"""Elements: whole vectors on any processor, also two at a time of bfloat16 on AVX-512."""


def forward(act: nn.Module, x: Tensor, out: Tensor) -> Tensor:
    """act(x), written to `out`, which may be `x`; both contiguous."""
    return _in_pieces(act, _forward, x, out)


def backward(act: nn.Module, x: Tensor, gradient: Tensor, out: Tensor) -> Tensor:
    """gradient · act'(x), written to `out`; all contiguous."""
    return _in_pieces(act, _backward, x, gradient, out)


def gated(act: nn.Module, gate: Tensor, up: Tensor, out: Tensor) -> None:
    """act(gate)·up, written to `out`; all contiguous."""
    if fused.takes(act, gate):
        fused.gated(gate, up, out)
    else:
        forward(act, gate, out=out).mul_(up)


def gated_backward(act: nn.Module, gate: Tensor, up: Tensor, g_h: Tensor, g_gate: Tensor, g_up: Tensor) -> None:
    """From the gradient at act(gate)·up; writes the last two, all contiguous."""
    if fused.takes(act, gate):
        fused.gated_backward(gate, up, g_h, g_gate, g_up)
    else:
        forward(act, gate, out=g_up).mul_(g_h)
        backward(act, gate, g_h * up, out=g_gate)


def _in_pieces(act: nn.Module, compute: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Returns the last tensor."""
    sizes = _pieces(tensors[0])
    if len(sizes) == 1:
        return compute(act, *tensors)
    for piece in zip(*(tensor.view(-1).split(sizes) for tensor in tensors), strict=True):
        compute(act, *piece)
    return tensors[-1]


def _pieces(x: Tensor) -> list[int]:
    """Sizes of the pieces: first one that threads share in whole vectors, then those of one thread each."""
    size, threads, grains = x.numel(), torch.get_num_threads(), x.numel() // _GRAIN
    if x.device.type != "cpu" or threads == 1 or size <= _ALONE:
        return [size]
    if grains >= threads:
        shared = size - size % (threads * _VECTORS)
    else:  # so many grains that a T-th of them is whole vectors, too: a grain is a power of two
        odd = threads // (threads & -threads)
        shared = grains // odd * odd * _GRAIN
    alone = size - shared
    return [piece for piece in (shared, *[_ALONE] * (alone // _ALONE), alone % _ALONE) if piece]


def _forward(act: nn.Module, x: Tensor, out: Tensor) -> Tensor:
    match act:
        case nn.SiLU() | SiLUActivation():
            return torch.ops.aten.silu.out(x, out=out)
        case GELUTanh():
            return torch.ops.aten.gelu.out(x, approximate="tanh", out=out)
    return out.copy_(act(x))


def _backward(act: nn.Module, x: Tensor, gradient: Tensor, out: Tensor) -> Tensor:
    """By torch's own kernel: what autograd would ask for, without its graph."""
    match act:
        case nn.SiLU() | SiLUActivation():
            return torch.ops.aten.silu_backward.grad_input(gradient, x, grad_input=out)
        case GELUTanh():
            return torch.ops.aten.gelu_backward.grad_input(gradient, x, approximate="tanh", grad_input=out)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        y = act(leaf)
    return out.copy_(torch.autograd.grad(y, leaf, gradient)[0])
