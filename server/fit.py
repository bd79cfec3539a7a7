"""Which rows of a data set a job takes: long ones refused, skipped or cut, some held out. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from server.curriculum import permutation
from server.errors import Detail, MixloomError
from server.tokens import TokenRow

LongRows = Literal["refuse", "skip", "truncate"]
MAX_DETAILS = 20
HOLD_OUT_EPOCH = 2**32 - 1
"""The permutation of this epoch chooses the rows held out; no job trains so long."""
HOLD_OUT_FRACTION, FEWEST_HELD_OUT, MOST_HELD_OUT, FEWEST_ROWS = 0.1, 10, 200, 100


@dataclass(frozen=True)
class Fitted:
    """The rows that are left, and a sentence for each kind of row that is not used as it was uploaded."""

    rows: list[TokenRow]
    notes: list[str]


def fit_rows(rows: Sequence[TokenRow], *, cutoff: int, long_rows: LongRows, param: str) -> Fitted:
    """The rows that fit into `cutoff` tokens.

    refuse: raises `row_too_long`, naming the first rows. skip: leaves long rows out. truncate: keeps their
    first `cutoff` tokens, and leaves a row out when none of those is learned. Raises `row_without_target` for
    a row that has nothing to learn as it is, `no_rows_left`.
    """
    _refuse_targetless(rows, param)
    too_long = [index for index, row in enumerate(rows) if len(row.tokens) > cutoff]
    if too_long and long_rows == "refuse":
        raise _too_long(rows, too_long, cutoff, param)
    is_long = frozenset(too_long)
    kept: list[TokenRow] = []
    truncated = 0
    for index, row in enumerate(rows):
        if index not in is_long:
            kept.append(row)
        elif long_rows == "truncate" and any(row.supervised[1:cutoff]):
            kept.append(TokenRow(row.tokens[:cutoff], row.supervised[:cutoff]))
            truncated += 1
    if not kept:
        raise MixloomError(
            "no_rows_left",
            f"'{param}' has no row that fits into {cutoff} tokens with something to learn. Raise "
            "training.cutoff_length, or shorten the rows.",
            422,
            param,
        )
    return Fitted(kept, _notes(param, cutoff, skipped=len(rows) - len(kept), truncated=truncated))


def _notes(param: str, cutoff: int, *, skipped: int, truncated: int) -> list[str]:
    notes = []
    if skipped:
        notes.append(
            f"'{param}': {skipped} rows are left out, being longer than cutoff_length ({cutoff} tokens) or, "
            "cut to it, without anything to learn."
        )
    if truncated:
        notes.append(f"'{param}': {truncated} rows are cut to their first {cutoff} tokens.")
    return notes


def _too_long(rows: Sequence[TokenRow], too_long: list[int], cutoff: int, param: str) -> MixloomError:
    return MixloomError(
        "row_too_long",
        f"{len(too_long)} of {len(rows)} rows have more than training.cutoff_length, {cutoff} tokens "
        f"(the longest has {max(len(rows[index].tokens) for index in too_long)}). Shorten them, raise the "
        "cutoff, or set training.long_rows to 'skip' or 'truncate'.",
        422,
        param,
        [
            Detail(line=index + 1, message=f"row {index + 1} has {len(rows[index].tokens)} tokens")
            for index in too_long[:MAX_DETAILS]
        ],
    )


def _refuse_targetless(rows: Sequence[TokenRow], param: str) -> None:
    empty = [index for index, row in enumerate(rows) if not any(row.supervised[1:])]
    if empty:
        raise MixloomError(
            "row_without_target",
            f"{len(empty)} of {len(rows)} rows have no token to learn. Complete them, or leave them out.",
            422,
            param,
            [Detail(line=index + 1, message=f"row {index + 1}") for index in empty[:MAX_DETAILS]],
        )


def num_held_out(fraction: float | None, num_rows: int) -> int:
    """Rows to hold out for validation. None is `auto`: a tenth, within bounds, when there are enough rows.

    Raises `too_few_rows` when none would be left to train on.
    """
    if fraction is None:
        if num_rows < FEWEST_ROWS:
            return 0
        return min(MOST_HELD_OUT, max(FEWEST_HELD_OUT, round(HOLD_OUT_FRACTION * num_rows)))
    count = max(1, round(fraction * num_rows)) if fraction > 0 else 0
    if count >= num_rows:
        raise MixloomError(
            "too_few_rows",
            f"Of {num_rows} rows none can be held out and one be left to train on. Add rows, or set it to 0.",
            422,
            "validation",
        )
    return count


def hold_out(rows: Sequence[TokenRow], count: int, seed: int) -> tuple[list[TokenRow], list[TokenRow]]:
    """(rows to train on, rows held out), each in the order of the data set; the seed alone says which."""
    chosen = frozenset(permutation(seed, HOLD_OUT_EPOCH, len(rows))[:count].tolist())
    train = [row for index, row in enumerate(rows) if index not in chosen]
    return train, [row for index, row in enumerate(rows) if index in chosen]
