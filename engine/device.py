"""Copies between the CPU and a GPU for which nobody waits: what keeps a GPU's queue full (docs/design.md §3)."""

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """What was made on the CPU, there; from pinned memory where that is CUDA, so that the CPU goes on at once."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory; from CUDA into pinned memory, with one wait for all of them."""
    copies = {}
    for name, tensor in tensors.items():
        pinned = tensor.device.type == "cuda"
        copies[name] = torch.empty_like(tensor, device="cpu", pin_memory=pinned).copy_(tensor, non_blocking=pinned)
    for device in {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}:
        torch.cuda.synchronize(device)
    return copies


def may_look(device: torch.device) -> bool:
    """Whether to read a value of a tensor there costs no wait; where it does, a pass takes the forms for a GPU."""
    return device.type == "cpu"


@cache
def capability(device: torch.device) -> int:
    """CUDA's major compute capability (8 Ampere, 9 Hopper); of the `meta` device, where nothing runs, Hopper's."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
