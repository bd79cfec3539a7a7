"""One adapter's parameters: views of one flat float32 vector, so that the optimizer makes one pass over them.

Legend: D input width, O output width, R rank, E experts.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import AdapterConfig
from engine.families import Family
from engine.random import generator


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in the flat vector."""

    name: str
    start: int
    shape: tuple[int, int]

    @property
    def stop(self) -> int:
        return self.start + self.shape[0] * self.shape[1]


def parameter_name(layer: int, module: str, matrix: str, expert: int | None = None) -> str:
    """`matrix` is A [R, D], B [O, R] or, for the module `router`, weight [E, D]."""
    return f"{layer}.{module}.{matrix}" if expert is None else f"{layer}.{module}.{expert}.{matrix}"


class Layout:
    """The order of an adapter's parameters: every A, every B, every router, each contiguous."""

    def __init__(self, config: AdapterConfig, family: Family, shapes: Mapping[str, tuple[int, int]], num_layers: int):
        """`shapes`: module -> (O, D) of the frozen weight."""
        self.slots: dict[str, Slot] = {}
        self.pairs: set[tuple[str, int | None]] = set()  # (module, expert) with an A and a B in every layer
        self.size = 0
        experts: list[int | None] = list(range(config.num_experts or 0))
        for matrix in ("A", "B"):
            for layer in range(num_layers):
                for module in config.target_modules:
                    out_width, in_width = shapes[module]
                    shape = (config.rank, in_width) if matrix == "A" else (out_width, config.rank)
                    for expert in experts if config.is_mixture and module in family.mlp else [None]:
                        self._add(parameter_name(layer, module, matrix, expert), shape)
                        self.pairs.add((module, expert))
        if config.is_mixture:
            assert config.num_experts is not None
            for layer in range(num_layers):
                self._add(parameter_name(layer, "router", "weight"), (config.num_experts, shapes[family.gate][1]))

    def _add(self, name: str, shape: tuple[int, int]) -> None:
        self.slots[name] = Slot(name, self.size, shape)
        self.size += shape[0] * shape[1]


class Leaves:
    """An adapter's parameters as autograd leaves whose gradients are views of one flat vector."""

    def __init__(self, layout: Layout, flat: Tensor, gradient: Tensor | None):
        self.tensors: dict[str, Tensor] = {}
        for name, slot in layout.slots.items():
            leaf = flat[slot.start : slot.stop].view(slot.shape).detach()
            if gradient is not None:
                leaf.requires_grad_()
                leaf.grad = gradient[slot.start : slot.stop].view(slot.shape)
            self.tensors[name] = leaf


class Adapter:
    """The weights of one adapter on one base: `flat`, float32 [size]."""

    def __init__(self, config: AdapterConfig, layout: Layout, flat: Tensor):
        self.config = config
        self.layout = layout
        self.flat = flat
        self.leaves = Leaves(layout, flat, None)

    def view(self, layer: int, module: str, matrix: str, expert: int | None = None) -> Tensor:
        """One parameter, without gradient; writing to it changes the adapter."""
        return self.leaves.tensors[parameter_name(layer, module, matrix, expert)]

    def named(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.leaves.tensors.items()

    def initialize(self, seed: int) -> None:
        """A ~ Kaiming-uniform(sqrt 5), which is U(-1/sqrt D, 1/sqrt D); B = 0; router ~ N(0, 0.02)."""
        for name, parameter in self.named():
            draw = generator("initialize", seed, name)
            if name.endswith(".A"):
                bound = 1 / math.sqrt(parameter.shape[1])
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=draw))
            elif name.endswith(".B"):
                parameter.zero_()
            else:
                parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.02, generator=draw))
