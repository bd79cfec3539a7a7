"""One adapter's parameters: views of one flat float32 vector, so that the optimizer makes one pass over them.

Legend: D input width, O output width, R rank, E experts.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from engine.config import AdapterConfig
from engine.device import to_host
from engine.families import Family
from engine.random import generator


@dataclass(frozen=True)
class Slot:
    """Where the parameters of one matrix lie in the flat vector: all experts' together, B transposed."""

    layer: int
    module: str
    matrix: str
    start: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)

    def view(self, flat: Tensor) -> Tensor:
        """Of one adapter's vector [size], or of several [J, size]: with J in front."""
        return flat[..., self.start : self.stop].view(*flat.shape[:-1], *self.shape)


class Layout:
    """The order of an adapter's parameters: every A, every B, every router, every magnitude, each contiguous.

    Stored are A [R, D], B transposed [R, O] and the magnitude m [O] of DoRA, with E in front beside experts, and
    the router's weight [E, D]: so the pairs of all experts are one matrix [E·R, D or O] without a copy.
    """

    def __init__(self, config: AdapterConfig, family: Family, shapes: Mapping[str, tuple[int, int]], num_layers: int):
        """`shapes`: module -> (O, D) of the frozen weight."""
        self.slots: dict[tuple[int, str, str], Slot] = {}
        self.size = 0
        self.expert_modules = set(config.target_modules) & set(family.mlp) if config.is_mixture else set()
        for matrix in ("A", "B"):
            for layer in range(num_layers):
                for module in config.target_modules:
                    out_width, in_width = shapes[module]
                    width = in_width if matrix == "A" else out_width
                    self._add(layer, module, matrix, *self._experts(config, module), config.rank, width)
        if config.is_mixture:
            assert config.num_experts is not None
            for layer in range(num_layers):
                self._add(layer, "router", "weight", config.num_experts, shapes[family.gate][1])
        if config.dora:
            for layer in range(num_layers):
                for module in config.target_modules:
                    self._add(layer, module, "m", *self._experts(config, module), shapes[module][0])
        self.narrowings: dict[tuple[int, str], dict[tuple[str, ...], Slot]] = {}
        """(layer, input) -> neighbouring modules that read it -> their A together: [M·R, D], experts' [M, E, R, D]."""
        for input_name, neighbours in groupby(config.target_modules, family.input_of):
            modules = tuple(neighbours)
            for layer in range(num_layers):
                self.narrowings.setdefault((layer, input_name), {})[modules] = self._together(layer, modules)

    def _together(self, layer: int, modules: Sequence[str]) -> Slot:
        """The A of modules that are neighbours in the vector: one above the other, or with M in front of E."""
        first = self.slots[layer, modules[0], "A"]
        rows, width = first.shape[-2:]
        shape = (len(modules), *first.shape) if first.shape[:-2] else (len(modules) * rows, width)
        return Slot(layer, "+".join(modules), "A", first.start, shape)

    def _experts(self, config: AdapterConfig, module: str) -> list[int]:
        return [config.num_experts] if module in self.expert_modules and config.num_experts else []

    def _add(self, layer: int, module: str, matrix: str, *shape: int) -> None:
        slot = Slot(layer, module, matrix, self.size, shape)
        self.slots[layer, module, matrix] = slot
        self.size = slot.stop

    @cached_property
    def is_aligned(self) -> bool:
        """Whether every A and B lies at whole 16 bytes in bfloat16, in each of several vectors end to end."""
        pairs = [slot for slot in self.slots.values() if slot.matrix in ("A", "B")]
        return self.size % 8 == 0 and all(n % 8 == 0 for slot in pairs for n in (slot.start, *slot.shape[-2:]))

    def range_of(self, matrix: str) -> slice:
        """Where all matrices of one kind lie."""
        slots = [slot for slot in self.slots.values() if slot.matrix == matrix]
        return slice(slots[0].start, slots[-1].stop)

    @cached_property
    def heights(self) -> frozenset[int]:
        """Rows of the matrices that a pass multiplies by, as A [rows, D] and B [rows, O]: one's, those of several."""
        pairs = [slot for slot in self.slots.values() if slot.matrix in ("A", "B")]
        together = [slot for slots in self.narrowings.values() for slot in slots.values()]
        return frozenset({slot.shape[-2] for slot in pairs} | {math.prod(s.shape[:-1]) for s in (*pairs, *together)})

    @cached_property
    def num_pairs(self) -> int:
        """Pairs of A and B, each expert's counted."""
        stacks = [slot for slot in self.slots.values() if slot.matrix == "A"]
        return sum(math.prod(slot.shape[:-2]) for slot in stacks)

    def named(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Views by name, as formulas have them: `layer.module[.expert].matrix`; A [R, D], B [O, R], m [O]."""
        for slot in self.slots.values():
            view = slot.view(flat)
            of_experts = slot.module in self.expert_modules
            for expert, part in enumerate(view) if of_experts else [(None, view)]:
                place = slot.module if expert is None else f"{slot.module}.{expert}"
                yield f"{slot.layer}.{place}.{slot.matrix}", part.t() if slot.matrix == "B" else part


@dataclass(frozen=True)
class Parameter:
    """One slot as a pass sees it: what the matmuls read, and what their gradient is added to."""

    value: Tensor  # in the base's dtype
    precise: Tensor  # the same as the optimizer has it, float32
    gradient: Tensor | None

    def accumulate(self, gradient: Tensor) -> None:
        """`gradient`: any shape of as many elements."""
        assert self.gradient is not None
        if gradient.shape != self.gradient.shape:
            gradient = gradient.view(self.gradient.shape)
        self.gradient.add_(gradient)

    @property
    def parts(self) -> list["Parameter"]:
        """Of each expert, or of each microbatch of a stack; of a single matrix itself."""
        return [self] if self.value.dim() < 3 else self.unbound

    @cached_property
    def unbound(self) -> list["Parameter"]:
        """Along the first dimension."""
        values = self.value.unbind()
        precise = values if self.precise is self.value else self.precise.unbind()
        gradients = [None] * len(values) if self.gradient is None else self.gradient.unbind()
        return [Parameter(*part) for part in zip(values, precise, gradients, strict=True)]

    @cached_property
    def transposed(self) -> Sequence[Tensor]:
        """The values of `parts`, transposed."""
        return (self.value.t(),) if self.value.dim() < 3 else self.value.mT.unbind()

    def leaf(self) -> Tensor:
        """The precise value for autograd, which adds to the gradient by itself."""
        leaf = self.precise.detach()
        if self.gradient is not None:
            leaf.requires_grad_().grad = self.gradient
        return leaf


@dataclass
class Adapter:
    """The weights of one adapter on one base: `flat`, float32 [size]."""

    config: AdapterConfig
    layout: Layout
    flat: Tensor = field(repr=False)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """`Layout.named` of its own parameters; writing to them changes the adapter."""
        return self.layout.named(self.flat)

    def copy(self) -> "Adapter":
        """In host memory, whatever becomes of this one."""
        return replace(self, flat=to_host({"flat": self.flat})["flat"])

    def initialize(self, seed: int) -> None:
        """A ~ Kaiming-uniform(sqrt 5), which is U(-1/sqrt D, 1/sqrt D); B = 0; router ~ N(0, 0.02).

        The magnitudes are the base's to say (`BaseModel.initialize_magnitudes`).
        """
        for name, parameter in self.named():
            draw = generator("initialize", seed, name)
            if name.endswith(".A"):
                bound = 1 / math.sqrt(parameter.shape[1])
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=draw))
            elif name.endswith(".B"):
                parameter.zero_()
            elif name.endswith(".router.weight"):
                parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.02, generator=draw))


@dataclass(frozen=True)
class Weights:
    """The parameters, for one pass, of one adapter, or of J of the same config that ride together (`stacked`).

    Those have J in front of their shapes; but experts are numbered through, J·E of them.
    """

    config: AdapterConfig
    layout: Layout
    precise: Tensor  # float32 [size], or [J, size]
    value: Tensor  # the same in the base's dtype
    gradient: Tensor | None  # float32, like `precise`; None where nothing is trained
    norms: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """DoRA's, by layer and module, computed where they are first asked for."""
    _parameters: dict[Slot, Parameter] = field(default_factory=dict, init=False)

    @classmethod
    def of(cls, adapter: Adapter, dtype: torch.dtype, gradient: Tensor | None = None) -> "Weights":
        """Cast to the base's dtype in one go."""
        return cls(adapter.config, adapter.layout, adapter.flat, adapter.flat.to(dtype), gradient)

    @classmethod
    def stacked(cls, parts: Sequence["Weights"]) -> "Weights":
        """Copies of weights of the same layout, with a gradient of their own (`add_gradients`)."""
        first = parts[0]
        precise, value = (torch.stack([getattr(part, name) for part in parts]) for name in ("precise", "value"))
        gradient = None if first.gradient is None else torch.zeros_like(precise)
        return cls(first.config, first.layout, precise, value, gradient)

    def add_gradients(self, parts: Sequence["Weights"]) -> None:
        """To those that were stacked."""
        if self.gradient is not None:
            for part, gradient in zip(parts, self.gradient, strict=True):
                assert part.gradient is not None
                part.gradient.add_(gradient)

    def parameter(self, layer: int, module: str, matrix: str) -> Parameter:
        return self.of_slot(self.layout.slots[layer, module, matrix])

    def of_slot(self, slot: Slot) -> Parameter:
        """One of the layout's."""
        if slot not in self._parameters:
            value = slot.view(self.value)
            precise = value if self.precise is self.value else slot.view(self.precise)
            if self.value.dim() > 1 and slot.module in self.layout.expert_modules:
                value = value.flatten(0, 1)
            gradient = None if self.gradient is None else slot.view(self.gradient)
            self._parameters[slot] = Parameter(value, precise, gradient)
        return self._parameters[slot]

    def with_gradient(self, gradient: Tensor) -> "Weights":
        """The same weights, whose gradients are added elsewhere."""
        return replace(self, gradient=gradient)
