"""Whether this machine keeps the facts that company invariance rests on, for this base (docs/design.md §3).

Each fact says that a part of a pass has the same bits alone and among others, or on fewer threads. They are tried at
the base's own widths, since where a thread's part ends depends on them.

Legend: n rows of a pack, D input width, O output width, R rank.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from engine import activation
from engine.adapter import Parameter
from engine.attention import one_sequence
from engine.base_model import BaseModel
from engine.grouped import Slices
from engine.segments import FEWEST_ROWS, ROW_MULTIPLE

PACKED_ROWS = 20 * ROW_MULTIPLE
SEGMENT_ROWS = (ROW_MULTIPLE, FEWEST_ROWS + 1, 106, 313, 1000)
SEQUENCE_LENGTHS = (*range(1, 65), 201, 313, 1000)
RANK = 8


def failing_facts(base: BaseModel) -> list[str]:
    """The names of the facts that do not hold; none on CUDA is claimed to."""
    if base.device.type != "cpu":
        return list(FACTS)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return [name for name, holds in FACTS.items() if not all(holds(base, one, draw) for one in _widths(base))]


def _widths(base: BaseModel) -> Iterator[nn.Linear]:
    """One frozen linear module of each shape."""
    seen = set()
    for (_, module), linear in base.linears.items():
        if base.shapes[module] not in seen:
            seen.add(base.shapes[module])
            yield linear.frozen


def _rows_of_frozen_matmuls(base: BaseModel, frozen: nn.Linear, draw: torch.Generator) -> bool:
    """Rows in whole multiples come out the same from a short and from a long pack, forward and backward."""
    weight_OD = frozen.weight
    x_nD, g_nO = (
        torch.randn(PACKED_ROWS, width, generator=draw).to(weight_OD.dtype) for width in weight_OD.shape[::-1]
    )
    y_nO, g_x_nD = F.linear(x_nD, weight_OD), g_nO @ weight_OD
    for start, stop in ((0, ROW_MULTIPLE), (ROW_MULTIPLE, 3 * ROW_MULTIPLE), (ROW_MULTIPLE, PACKED_ROWS)):
        alone = slice(start, stop)
        if not torch.equal(F.linear(x_nD[alone].clone(), weight_OD), y_nO[alone]):
            return False
        if not torch.equal(g_nO[alone].clone() @ weight_OD, g_x_nD[alone]):
            return False
    return True


def _segments_anywhere_in_a_pack(base: BaseModel, frozen: nn.Linear, draw: torch.Generator) -> bool:
    """A segment's matmuls of rank R and its activation do not depend on the row at which it starts."""
    out_width, in_width = frozen.weight.shape
    dtype, act = frozen.weight.dtype, ACT2FN[base.activation_name]
    x_nD, y_nO = (torch.randn(PACKED_ROWS, width, generator=draw).to(dtype) for width in (in_width, out_width))
    a_RD, b_RO = (torch.randn(RANK, width, generator=draw).to(dtype) for width in (in_width, out_width))
    for start, stop in ((1, 24), (5, 111), (7, PACKED_ROWS)):
        rows = slice(start, stop)
        if not all(
            torch.equal(in_pack, alone)
            for in_pack, alone in zip(
                _of_segment(x_nD[rows], y_nO.clone()[rows], a_RD, b_RO, act),
                _of_segment(x_nD[rows].clone(), y_nO[rows].clone(), a_RD, b_RO, act),
                strict=True,
            )
        ):
            return False
    return True


def _experts_together(base: BaseModel, frozen: nn.Linear, draw: torch.Generator) -> bool:
    """One call for all experts has the bits of one for each."""
    sizes, dtype = (2 * ROW_MULTIPLE, 0, ROW_MULTIPLE, 13 * ROW_MULTIPLE), frozen.weight.dtype
    for width in frozen.weight.shape:
        w_ERO, low_mR, x_mO = (
            torch.randn(shape, generator=draw).to(dtype)
            for shape in ((len(sizes), RANK, width), (sum(sizes), RANK), (sum(sizes), width))
        )
        together = _products(Slices(0, sizes), low_mR, x_mO, w_ERO)
        for expert, rows in Slices(0, sizes).shares:
            alone = _products(Slices(expert, [sizes[expert]]), low_mR[rows], x_mO[rows], w_ERO)
            parts = together[0][rows], together[1][rows], together[2][expert]
            if not all(map(torch.equal, parts, (*alone[:2], alone[2][expert]))):
                return False
    return True


def _products(groups: Slices, low_mR: Tensor, x_mO: Tensor, w_ERO: Tensor) -> list[Tensor]:
    w = Parameter(w_ERO, w_ERO.float(), torch.zeros_like(w_ERO, dtype=torch.float32))
    groups.accumulate(w, low_mR, x_mO)
    assert w.gradient is not None
    return [groups.widen(low_mR, w), groups.narrow(x_mO, w), w.gradient]


def any_number_of_threads(base: BaseModel) -> bool:
    """Whether what a pass computes is the same on any share of the threads as on all; on CUDA there are none to share.

    Tried as the facts are, for segments of `FEWEST_ROWS` or more and sequences of any length. It is no promise: where
    it does not hold, passes do not share (`engine.lanes`).
    """
    if base.device.type != "cpu":
        return False
    return _same_on_fewer(partial(_attention, base)) and all(
        _same_on_fewer(partial(_segments, base, frozen)) for frozen in _widths(base)
    )


def any_number_of_threads_at(base: BaseModel, height: int, dtype: torch.dtype) -> bool:
    """The same of segments' products with an A, a B or a router of so many rows, and of its gradient.

    Threads may part a sum over tokens where it has few rows: on one EPYC, in float32, those of 5, 6, 7, 9, 10 and 11,
    not those of 8, 12 and more.
    """
    widths = {width for shape in base.shapes.values() for width in shape}
    return base.device.type == "cpu" and all(
        _same_on_fewer(partial(_narrowed, width, height, dtype)) for width in widths
    )


def _same_on_fewer(compute: Callable[[], Iterable[Tensor]]) -> bool:
    threads = torch.get_num_threads()

    def on(share: int) -> Iterable[Tensor]:
        torch.set_num_threads(share)
        return compute()

    try:
        on_all = list(on(threads))
        shares = {threads // lanes for lanes in range(2, threads + 1)}
        return all(all(map(torch.equal, on_all, on(share))) for share in shares)
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _segments(base: BaseModel, frozen: nn.Linear) -> list[Tensor]:
    """What a module, an adapter beside it and the activation make of segments."""
    weight_OD, act, draw = frozen.weight, ACT2FN[base.activation_name], torch.Generator().manual_seed(0)

    def random(rows: int) -> list[Tensor]:
        return [torch.randn(rows, width, generator=draw).to(weight_OD.dtype) for width in weight_OD.shape[::-1]]

    a_RD, b_RO = random(RANK)
    made = []
    for rows in SEGMENT_ROWS:
        x_nD, y_nO = random(rows)
        whole = slice(rows // ROW_MULTIPLE * ROW_MULTIPLE)
        made += [F.linear(x_nD[whole], weight_OD), y_nO[whole] @ weight_OD]
        made += _of_segment(x_nD, y_nO, a_RD, b_RO, act)
    return made


def _attention(base: BaseModel) -> Iterator[Tensor]:
    """Of sequences, with its gradients: where there are few heads, threads share the matmuls of one."""
    config, draw = base.config, torch.Generator().manual_seed(0)
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    softcap = getattr(config, "attn_logit_softcapping", None)
    windows = {None, getattr(config, "sliding_window", None)}
    for length, window in product(SEQUENCE_LENGTHS, windows):
        q, k, v = (
            torch.randn(1, n, length, width, generator=draw, requires_grad=True) for n in (heads, groups, groups)
        )
        y = one_sequence(q, k, v, None, window, softcap)
        yield y.detach()
        yield from torch.autograd.grad(y, (q, k, v), torch.randn(y.shape, generator=draw))


@torch.no_grad()
def _narrowed(width: int, height: int, dtype: torch.dtype) -> list[Tensor]:
    """Of few segments, since what is compiled for each number of rows stays in memory."""
    draw, made = torch.Generator().manual_seed(0), []
    a_RD = torch.randn(height, width, generator=draw).to(dtype)
    for rows in (FEWEST_ROWS + 1, 313, 1000):
        x_nD = torch.randn(rows, width, generator=draw).to(dtype)
        low_nR = F.linear(x_nD, a_RD)
        made += [low_nR, low_nR.t() @ x_nD]
    return made


def _of_segment(x_nD: Tensor, y_nO: Tensor, a_RD: Tensor, b_RO: Tensor, act: nn.Module) -> list[Tensor]:
    low_nR = F.linear(x_nD, a_RD)
    back_nR = y_nO @ b_RO.t()
    gradients = [low_nR.t() @ y_nO, back_nR.t() @ x_nD, back_nR @ a_RD]
    activated_nO = activation.forward(act, y_nO, out=torch.empty_like(y_nO))
    gradients.append(activation.backward(act, y_nO, activated_nO, out=torch.empty_like(y_nO)))
    h_nO, g_gate_nO, g_up_nO = (torch.empty_like(y_nO) for _ in range(3))
    activation.gated(act, y_nO, y_nO, h_nO)
    activation.gated_backward(act, y_nO, y_nO, h_nO, g_gate_nO, g_up_nO)
    gradients += [h_nO, g_gate_nO, g_up_nO]
    return [low_nR, back_nR, *gradients, activated_nO, y_nO.addmm_(low_nR, b_RO)]


FACTS: dict[str, Callable[[BaseModel, nn.Linear, torch.Generator], bool]] = {
    "rows of frozen matmuls": _rows_of_frozen_matmuls,
    "segments anywhere in a pack": _segments_anywhere_in_a_pack,
    "experts together": _experts_together,
}
