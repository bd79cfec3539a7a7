"""Loops over elements, compiled by Numba: what those of `engine.fused` and `engine.random` have in common.

Each process compiles them at their first call: Numba's cache on disk may go on with an older version's code after a
kill. None holds Python's lock.
"""

from functools import partial
from typing import Any

from numba import njit, types
from numba.extending import intrinsic

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
