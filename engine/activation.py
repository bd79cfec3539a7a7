"""The derivative of a gate's activation, by torch's own kernel: what autograd would ask for, without its graph."""

import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation


def backward(activation: nn.Module, x: Tensor, gradient: Tensor, out: Tensor) -> Tensor:
    """gradient · activation'(x), written to `out`."""
    match activation:
        case nn.SiLU() | SiLUActivation():
            return torch.ops.aten.silu_backward.grad_input(gradient, x, grad_input=out)
        case GELUTanh():
            return torch.ops.aten.gelu_backward.grad_input(gradient, x, approximate="tanh", grad_input=out)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        y = activation(leaf)
    return out.copy_(torch.autograd.grad(y, leaf, gradient)[0])
