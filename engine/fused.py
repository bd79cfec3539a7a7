"""What the feed-forward computes element by element on a CPU, in one loop over each row (docs/design.md §3).

torch goes through memory once for each operation: gather, add, activation, product, dropout, sum. These loops are
compiled by Numba, by each process at their first call: its cache on disk may go on with an older version's code after a
kill. None holds Python's lock. A row's bits depend on that row alone, and not on how wide the processor's vectors are.
bfloat16 is computed in float32 and rounded once.

Legend: n tokens, K active experts, N places of their slots, m those of a block, F feed-forward width.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic, overload
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from engine import device
from engine.lanes import on_all_threads

Array = NDArray[Any]
ROWS = 128
"""Of a part that a thread takes at once."""
_ONE = np.float32(1)
_NO_PLACES = np.empty(0, np.int64)


def takes(act: nn.Module, x: Tensor) -> bool:
    """Whether there are loops for this activation and for tensors like `x`."""
    return device.may_look(x.device) and isinstance(act, (nn.SiLU, SiLUActivation))


def gated(gate_nF: Tensor, up_nF: Tensor, h_nF: Tensor) -> None:
    """h = silu(gate)·up."""
    _over_rows(_gated, gate_nF, up_nF, h_nF)


def gated_backward(gate_nF: Tensor, up_nF: Tensor, g_h_nF: Tensor, g_gate_nF: Tensor, g_up_nF: Tensor) -> None:
    """Writes the last two, from the gradient at h."""
    _over_rows(_gated_backward, gate_nF, up_nF, g_h_nF, g_gate_nF, g_up_nF)


def forward(
    gate_nF: Tensor, up_nF: Tensor, token_m: Tensor, gate_mF: Tensor, up_mF: Tensor, places: Tensor | None, h_mF: Tensor
) -> None:
    """h = silu(W1x + gate)·(W3x + up), where gate and up are what a place's own LoRA adds (paper eq. 5 and 6).

    `gate_mF` becomes dropout(h), whose elements `places` are 0.
    """
    _forward(*map(_array, (gate_nF, up_nF, token_m, gate_mF, up_mF, places, h_mF)))


def backward(
    gate_nF: Tensor,
    up_nF: Tensor,
    g_hidden_nF: Tensor,
    token_m: Tensor,
    r_m: Tensor,
    gate_mF: Tensor,
    up_mF: Tensor,
    g_dropped_mF: Tensor,
    places: Tensor | None,
    g_r_m: Tensor,
) -> None:
    """From the gradients at Σ_k r_k h_k and at dropout(h).

    `gate_mF` and `up_mF`, as `forward` was given them, become the gradients there, `g_dropped_mF` becomes dropout(h).
    Adds that of r to `g_r_m`.
    """
    tensors = gate_nF, up_nF, g_hidden_nF, token_m, r_m, gate_mF, up_mF, g_dropped_mF, places, g_r_m
    _backward(*map(_array, tensors))


def combine(x_NF: Tensor, place_nK: Tensor, weights_nK: Tensor, out_nF: Tensor) -> None:
    """Σ_k r_k x_k of each token, written to `out_nF`."""
    _over_rows(partial(_combine, _array(x_NF)), place_nK, weights_nK, out_nF)


def _over_rows(loop: Callable[..., None], *tensors: Tensor) -> None:
    arrays = [_array(tensor) for tensor in tensors]

    def work(start: int) -> None:
        loop(*(array[start : start + ROWS] for array in arrays))

    on_all_threads(work, range(0, len(arrays[0]), ROWS))


def _array(tensor: Tensor | None) -> Array:
    """The same memory, numpy has no bfloat16; no places where there is no tensor."""
    if tensor is None:
        return _NO_PLACES
    assert tensor.is_contiguous(), "of another layout a loop is another, with other bits"
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


def _reinterpret(kind: types.Type, as_kind: types.Type) -> Any:
    """A function that reads the bits of one type as another."""

    @intrinsic
    def bits_as(context: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(as_kind))

        return as_kind(kind), generate

    return bits_as


_float_of = _reinterpret(types.uint32, types.float32)
_bits_of = _reinterpret(types.float32, types.uint32)


def _load(element: Any) -> Any:
    """The number that an element stands for: of bfloat16 the upper half of a float32's bits."""
    raise NotImplementedError


@overload(_load)
def _load_of(element: Any) -> Any:
    def same(element: Any) -> Any:
        return element

    def widened(element: Any) -> Any:
        return _float_of(np.uint32(element) << np.uint32(16))

    return widened if element is types.uint16 else same


def _store(row: Any, value: Any) -> Any:
    """The number as an element of `row`, rounded to nearest, ties to even."""
    raise NotImplementedError


@overload(_store)
def _store_of(row: Any, value: Any) -> Any:
    def same(row: Any, value: Any) -> Any:
        return value

    def rounded(row: Any, value: Any) -> Any:
        bits = _bits_of(value)
        nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return np.uint16(nearest) if value == value else np.uint16(0x7FC0)

    return rounded if row.dtype is types.uint16 else same


def _exp(x: Any) -> Any:
    """e^x, to 2 units in the last place: in float32 as Cephes has it (Moshier 1992), which vectorizes.

    There it is finite, and of NaN any number: silu multiplies by x again.
    """
    raise NotImplementedError


@overload(_exp)
def _exp_of(x: Any) -> Any:
    def precise(x: Any) -> Any:
        return math.exp(x)

    def single(x: Any) -> Any:
        x = min(max(x, np.float32(-87)), np.float32(88))
        n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
        r = x - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
        p = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        power = _float_of(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))
        return (p * r * r + r + _ONE) * power

    return single if x is types.float32 else precise


_compiled = njit(nogil=True, error_model="numpy")  # whose division has no branch for 0, so that loops vectorize


@_compiled
def _dot(x: Array, y: Array, products: Array) -> Any:
    """Σ_f x_f y_f, by halves; `products` is room for them."""
    size = len(x)
    for f in range(size):
        products[f] = _load(x[f]) * _load(y[f])
    while size > 1:
        half = size // 2
        for f in range(half):
            products[f] += products[size - half + f]
        size -= half
    return products[0]


@_compiled
def _gated(gate_n: Array, up_n: Array, h_n: Array) -> None:
    for i in range(len(h_n)):
        gate, up, h = gate_n[i], up_n[i], h_n[i]
        for f in range(len(h)):
            g = _load(gate[f])
            h[f] = _store(h, g / (_ONE + _exp(-g)) * _load(up[f]))


@_compiled
def _gated_backward(gate_n: Array, up_n: Array, g_h_n: Array, g_gate_n: Array, g_up_n: Array) -> None:
    for i in range(len(gate_n)):
        gate, up, g_hidden, g_gate, g_up = gate_n[i], up_n[i], g_h_n[i], g_gate_n[i], g_up_n[i]
        for f in range(len(gate)):
            g, g_h = _load(gate[f]), _load(g_hidden[f])
            sigmoid = _ONE / (_ONE + _exp(-g))
            silu = g * sigmoid
            g_up[f] = _store(g_up, g_h * silu)
            g_gate[f] = _store(g_gate, g_h * _load(up[f]) * (sigmoid + silu * (_ONE - sigmoid)))


@_compiled
def _forward(gate_n: Array, up_n: Array, token: Array, gate_m: Array, up_m: Array, places: Array, h_m: Array) -> None:
    for i in range(len(token)):
        gate_x, up_x, gate, up, h = gate_n[token[i]], up_n[token[i]], gate_m[i], up_m[i], h_m[i]
        for f in range(len(h)):
            g = _load(gate_x[f]) + _load(gate[f])
            u = _load(up_x[f]) + _load(up[f])
            value = g / (_ONE + _exp(-g)) * u
            h[f] = _store(h, value)
            gate[f] = _store(gate, value)
    _drop(gate_m, places)


@_compiled
def _backward(
    gate_n: Array,
    up_n: Array,
    g_hidden_n: Array,
    token: Array,
    r: Array,
    gate_m: Array,
    up_m: Array,
    g_dropped_m: Array,
    places: Array,
    g_r: Array,
) -> None:
    _drop(g_dropped_m, places)
    products = np.empty(gate_n.shape[1], r.dtype)
    for i in range(len(token)):
        t = token[i]
        gate_x, up_x, g_hidden = gate_n[t], up_n[t], g_hidden_n[t]
        gate, up, g_dropped = gate_m[i], up_m[i], g_dropped_m[i]
        for f in range(len(gate)):
            g = _load(gate_x[f]) + _load(gate[f])
            u = _load(up_x[f]) + _load(up[f])
            sigmoid = _ONE / (_ONE + _exp(-g))
            silu = g * sigmoid
            g_h = r[i] * _load(g_hidden[f]) + _load(g_dropped[f])
            up[f] = _store(up, g_h * silu)
            gate[f] = _store(gate, g_h * u * (sigmoid + silu * (_ONE - sigmoid)))
            g_dropped[f] = _store(g_dropped, silu * u)
        g_r[i] += _dot(g_hidden, g_dropped, products)
    _drop(g_dropped_m, places)


@_compiled
def _drop(x_m: Array, places: Array) -> None:
    elements = x_m.reshape(x_m.size)
    for place in places:
        if 0 <= place < len(elements):  # which nobody else would look at
            elements[place] = 0


@_compiled
def _combine(x_N: Array, place_nK: Array, weights_nK: Array, out_n: Array) -> None:
    sums = np.empty(x_N.shape[1], weights_nK.dtype)
    for i in range(len(out_n)):
        sums[:] = 0
        for k in range(place_nK.shape[1]):
            x, weight = x_N[place_nK[i, k]], weights_nK[i, k]
            for f in range(len(sums)):
                sums[f] += weight * _load(x[f])
        out = out_n[i]
        for f in range(len(sums)):
            out[f] = _store(out, sums[f])
