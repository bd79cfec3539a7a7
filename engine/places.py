"""Where slots lie on a CPU, and what goes between their places and their tokens' cells: loops over rows of rank R.

A slot is one (token, active expert). Its place is a row among those of all slots, sorted by expert; its cell is the
part of its token's row that is that expert's. Of M modules at once, each has places and cells of its own.

Legend: n tokens, K active experts, N places, M modules, E experts, R rank.
"""

from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from engine.loops import array_of, compiled, load, store

Array = NDArray[Any]


def sort(expert_nK: Tensor, starts_E: Tensor, place_nK: Tensor, slot_N: Tensor) -> None:
    """Gives each slot the next of its expert's places, which start there: writes slot -> place and place -> slot."""
    _sort(array_of(expert_nK).reshape(-1), array_of(starts_E).copy(), array_of(place_nK).reshape(-1), array_of(slot_N))


def to_cells(low_MNR: Tensor, place_nK: Tensor, expert_nK: Tensor, factor_nK: Tensor, cells_nMER: Tensor) -> None:
    """Writes each place's row, times its slot's factor, to the slot's cell; other cells keep what they have."""
    _to_cells(*map(array_of, (low_MNR, place_nK, expert_nK, factor_nK, cells_nMER)))


def from_cells(cells_nMER: Tensor, place_nK: Tensor, expert_nK: Tensor, factor_nK: Tensor, low_MNR: Tensor) -> None:
    """Writes each slot's cell, times its factor, to its place; places without a slot keep what they have."""
    _from_cells(*map(array_of, (cells_nMER, place_nK, expert_nK, factor_nK, low_MNR)))


def dot(cells_nMER: Tensor, low_MNR: Tensor, place_nK: Tensor, expert_nK: Tensor, out_nK: Tensor) -> None:
    """Writes each slot's Σ of its cells times its rows."""
    _dot(*map(array_of, (cells_nMER, low_MNR, place_nK, expert_nK, out_nK)))


@compiled()
def _sort(experts: Array, next_E: Array, places: Array, slots: Array) -> None:
    for slot in range(len(experts)):
        place = next_E[experts[slot]]
        places[slot], slots[place] = place, slot
        next_E[experts[slot]] += 1


@compiled()
def _to_cells(low: Array, place: Array, expert: Array, factor: Array, cells: Array) -> None:
    for i in range(len(cells)):
        for k in range(place.shape[1]):
            for m in range(len(low)):
                cell, row = cells[i, m, expert[i, k]], low[m, place[i, k]]
                for c in range(len(cell)):
                    cell[c] = store(cell, factor[i, k] * load(row[c]))


@compiled()
def _from_cells(cells: Array, place: Array, expert: Array, factor: Array, low: Array) -> None:
    for i in range(len(cells)):
        for k in range(place.shape[1]):
            for m in range(len(low)):
                cell, row = cells[i, m, expert[i, k]], low[m, place[i, k]]
                for c in range(len(row)):
                    row[c] = store(row, factor[i, k] * load(cell[c]))


@compiled()
def _dot(cells: Array, low: Array, place: Array, expert: Array, out: Array) -> None:
    for i in range(len(cells)):
        for k in range(place.shape[1]):
            out[i, k] = 0
            for m in range(len(low)):
                cell, row = cells[i, m, expert[i, k]], low[m, place[i, k]]
                for c in range(len(row)):
                    out[i, k] += load(cell[c]) * load(row[c])
