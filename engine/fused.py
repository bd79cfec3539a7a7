"""What the feed-forward computes element by element on a CPU, in one loop over each row (docs/design.md §3).

torch goes through memory once for each operation: gather, add, activation, product, dropout, sum. Of these loops, a
row's bits depend on that row alone, and not on how wide the processor's vectors are. bfloat16 is computed in float32
and rounded once.

Legend: n tokens, K active experts, N places of their slots, F feed-forward width.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import overload
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from engine import device
from engine.lanes import on_all_threads
from engine.loops import array_of, compiled, float_of, load, store

Array = NDArray[Any]
ROWS = 128
"""Of a part that a thread takes at once."""
_ONE = np.float32(1)
_NO_DROPS = np.empty(0, np.int64)


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
    gate_nF: Tensor,
    up_nF: Tensor,
    place_nK: Tensor,
    r_nK: Tensor,
    gate_NF: Tensor,
    up_NF: Tensor,
    drops: Tensor | None,
    hidden_nF: Tensor,
) -> None:
    """Σ_k r_k h_k, h = silu(W1x + gate)·(W3x + up), where gate and up are a place's own LoRA (paper eq. 5 and 6).

    It is written to `hidden_nF`. `gate_NF` becomes dropout(h), whose elements `drops`, ascending, are 0; but not
    where no token has a place.
    """
    arrays = array_of(gate_NF), array_of(up_NF), *_by_row(drops, gate_NF)
    _over_rows(partial(_forward, *arrays), gate_nF, up_nF, place_nK, r_nK, hidden_nF)


def backward(
    gate_nF: Tensor,
    up_nF: Tensor,
    place_nK: Tensor,
    r_nK: Tensor,
    gate_NF: Tensor,
    up_NF: Tensor,
    g_dropped_NF: Tensor,
    drops: Tensor | None,
    g_hidden_nF: Tensor,
    g_gate_nF: Tensor,
    g_up_nF: Tensor,
    g_r_nK: Tensor,
) -> None:
    """From the gradients at Σ_k r_k h_k and at dropout(h), writes those at W1x, at W3x and, of that sum, at r.

    `gate_NF` and `up_NF`, as `forward` was given them, become the gradients there, `g_dropped_NF` becomes dropout(h);
    but not where no token has a place.
    """
    arrays = array_of(gate_NF), array_of(up_NF), array_of(g_dropped_NF), *_by_row(drops, gate_NF)
    _over_rows(partial(_backward, *arrays), gate_nF, up_nF, place_nK, r_nK, g_hidden_nF, g_gate_nF, g_up_nF, g_r_nK)


def combine(x_NF: Tensor, place_nK: Tensor, weights_nK: Tensor, out_nF: Tensor) -> None:
    """Σ_k r_k x_k of each token, written to `out_nF`."""
    _over_rows(partial(_combine, array_of(x_NF)), place_nK, weights_nK, out_nF)


def _over_rows(loop: Callable[..., None], *tensors: Tensor) -> None:
    arrays = [array_of(tensor) for tensor in tensors]
    if torch.get_num_threads() == 1:
        loop(*arrays)
        return

    def work(start: int) -> None:
        loop(*(array[start : start + ROWS] for array in arrays))

    on_all_threads(work, range(0, len(arrays[0]), ROWS))


def _by_row(drops: Tensor | None, x_NF: Tensor) -> tuple[Array, Array]:
    """The dropped elements of `x_NF`, and where those of each row begin [N + 1]."""
    rows, width = x_NF.shape
    array = _NO_DROPS if drops is None else array_of(drops)
    return array, np.searchsorted(array, np.arange(rows + 1) * width)


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
        power = float_of(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))
        return (p * r * r + r + _ONE) * power

    return single if x is types.float32 else precise


_compiled = compiled(fastmath={"contract"})  # a product and a sum at once, where the processor has that: rounded once


@_compiled
def _sum(terms: Array) -> Any:
    """By halves, in the terms' own memory."""
    size = len(terms)
    while size > 1:
        half = size // 2
        _add(terms[:half], _ONE, terms[size - half : size])
        size -= half
    return terms[0]


@_compiled
def _gated(gate_n: Array, up_n: Array, h_n: Array) -> None:
    for i in range(len(h_n)):
        gate, up, h = gate_n[i], up_n[i], h_n[i]
        for f in range(len(h)):
            g = load(gate[f])
            h[f] = store(h, g / (_ONE + _exp(-g)) * load(up[f]))


@_compiled
def _gated_backward(gate_n: Array, up_n: Array, g_h_n: Array, g_gate_n: Array, g_up_n: Array) -> None:
    for i in range(len(gate_n)):
        gate, up, g_hidden, g_gate, g_up = gate_n[i], up_n[i], g_h_n[i], g_gate_n[i], g_up_n[i]
        for f in range(len(gate)):
            g, g_h = load(gate[f]), load(g_hidden[f])
            sigmoid = _ONE / (_ONE + _exp(-g))
            silu = g * sigmoid
            g_up[f] = store(g_up, g_h * silu)
            g_gate[f] = store(g_gate, g_h * load(up[f]) * (sigmoid + silu * (_ONE - sigmoid)))


@_compiled
def _forward(
    gate_N: Array,
    up_N: Array,
    drops: Array,
    starts: Array,
    gate_n: Array,
    up_n: Array,
    place: Array,
    r: Array,
    hidden_n: Array,
) -> None:
    width = gate_n.shape[1]
    h, sums = np.empty(width, r.dtype), np.empty(width, r.dtype)
    for i in range(len(hidden_n)):
        gate_x, up_x, hidden = gate_n[i], up_n[i], hidden_n[i]
        sums[:] = 0
        for k in range(place.shape[1]):
            gate, up = gate_N[place[i, k]], up_N[place[i, k]]
            for f in range(width):
                g = load(gate_x[f]) + load(gate[f])
                h[f] = g / (_ONE + _exp(-g)) * (load(up_x[f]) + load(up[f]))
                gate[f] = store(gate, h[f])
            _add(sums, r[i, k], h)
            _drop(gate, place[i, k], drops, starts)
        _write(hidden, sums)


@_compiled
def _backward(
    gate_N: Array,
    up_N: Array,
    g_dropped_N: Array,
    drops: Array,
    starts: Array,
    gate_n: Array,
    up_n: Array,
    place: Array,
    r: Array,
    g_hidden_n: Array,
    g_gate_n: Array,
    g_up_n: Array,
    g_r: Array,
) -> None:
    width = gate_n.shape[1]
    products, at_gate, at_up = np.empty(width, r.dtype), np.empty(width, r.dtype), np.empty(width, r.dtype)
    g_gate, g_up = np.empty(width, r.dtype), np.empty(width, r.dtype)
    for i in range(len(gate_n)):
        gate_x, up_x, g_hidden = gate_n[i], up_n[i], g_hidden_n[i]
        g_gate[:] = 0
        g_up[:] = 0
        for k in range(place.shape[1]):
            p, weight = place[i, k], r[i, k]
            gate, up, g_dropped = gate_N[p], up_N[p], g_dropped_N[p]
            _drop(g_dropped, p, drops, starts)
            for f in range(width):
                g = load(gate_x[f]) + load(gate[f])
                u = load(up_x[f]) + load(up[f])
                sigmoid = _ONE / (_ONE + _exp(-g))
                silu = g * sigmoid
                h = silu * u
                g_h = weight * load(g_hidden[f]) + load(g_dropped[f])
                at_up[f] = g_h * silu
                at_gate[f] = g_h * u * (sigmoid + silu * (_ONE - sigmoid))
                products[f] = load(g_hidden[f]) * h
                g_dropped[f] = store(g_dropped, h)
            _write(up, at_up)
            _write(gate, at_gate)
            _add(g_up, _ONE, at_up)
            _add(g_gate, _ONE, at_gate)
            g_r[i, k] = _sum(products)
            _drop(g_dropped, p, drops, starts)
        _write(g_gate_n[i], g_gate)
        _write(g_up_n[i], g_up)


@_compiled
def _add(sums: Array, factor: Any, x: Array) -> None:
    for f in range(len(sums)):
        sums[f] += factor * x[f]


@_compiled
def _write(row: Array, x: Array) -> None:
    for f in range(len(row)):
        row[f] = store(row, x[f])


@_compiled
def _drop(x: Array, row: int, drops: Array, starts: Array) -> None:
    """Makes 0 of what is dropped of a row: `drops` counts through all rows."""
    for j in range(starts[row], starts[row + 1]):
        x[drops[j] - row * len(x)] = 0


@_compiled
def _combine(x_N: Array, place_nK: Array, weights_nK: Array, out_n: Array) -> None:
    sums = np.empty(x_N.shape[1], weights_nK.dtype)
    for i in range(len(out_n)):
        x, weight = x_N[place_nK[i, 0]], weights_nK[i, 0]
        for f in range(len(sums)):
            sums[f] = weight * load(x[f])
        for k in range(1, place_nK.shape[1]):
            x, weight = x_N[place_nK[i, k]], weights_nK[i, k]
            for f in range(len(sums)):
                sums[f] += weight * load(x[f])
        out = out_n[i]
        for f in range(len(sums)):
            out[f] = store(out, sums[f])
