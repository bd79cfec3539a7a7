"""Loops over elements, compiled by Numba: what all of them have in common.

Each process compiles them at their first call: Numba's cache on disk may go on with an older version's code after a
kill. None holds Python's lock.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic, overload
from numpy.typing import NDArray
from torch import Tensor

compiled = partial(njit, nogil=True, error_model="numpy")  # whose division has no branch for 0, so that loops vectorize


def _reinterpret(kind: types.Type, as_kind: types.Type) -> Any:
    """A function that reads the bits of one type as another."""

    @intrinsic
    def bits_as(context: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(as_kind))

        return as_kind(kind), generate

    return bits_as


float_of = _reinterpret(types.uint32, types.float32)
bits_of = _reinterpret(types.float32, types.uint32)
double_of = _reinterpret(types.uint64, types.float64)
bits_of_double = _reinterpret(types.float64, types.uint64)


def array_of(tensor: Tensor) -> NDArray[Any]:
    """The same memory; numpy has no bfloat16, whose bits are of uint16."""
    assert tensor.is_contiguous(), "of another layout a loop is another, with other bits"
    if tensor.requires_grad:
        tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


def load(element: Any) -> Any:
    """The number that an element stands for: of bfloat16 the upper half of a float32's bits."""
    raise NotImplementedError


@overload(load)
def _load_of(element: Any) -> Any:
    def same(element: Any) -> Any:
        return element

    def widened(element: Any) -> Any:
        return float_of(np.uint32(element) << np.uint32(16))

    return widened if element is types.uint16 else same


def store(row: Any, value: Any) -> Any:
    """The number as an element of `row`, rounded to nearest, ties to even."""
    raise NotImplementedError


@overload(store)
def _store_of(row: Any, value: Any) -> Any:
    def same(row: Any, value: Any) -> Any:
        return value

    def rounded(row: Any, value: Any) -> Any:
        bits = bits_of(value)
        nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return np.uint16(nearest) if value == value else np.uint16(0x7FC0)

    return rounded if row.dtype is types.uint16 else same
