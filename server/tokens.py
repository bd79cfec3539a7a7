"""Rows of token ids, as a job keeps them: written once at submit, read by the daemon. Numpy only."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file


@dataclass(frozen=True)
class TokenRow:
    """One row. `supervised[i]` says whether the loss asks for `tokens[i]` given all before it."""

    tokens: list[int]
    supervised: list[bool]


@dataclass(frozen=True)
class TokenRows:
    """Many rows end to end: row i is `tokens[offsets[i]:offsets[i + 1]]`."""

    tokens: np.ndarray  # int32 [total]
    supervised: np.ndarray  # uint8 [total]; the first token of a row is never supervised
    offsets: np.ndarray  # int64 [rows + 1]

    @classmethod
    def of(cls, rows: Sequence[TokenRow]) -> "TokenRows":
        lengths = [len(row.tokens) for row in rows]
        supervised = np.array([flag for row in rows for flag in row.supervised], dtype=np.uint8)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        supervised[offsets[:-1]] = 0
        return cls(np.array([t for row in rows for t in row.tokens], dtype=np.int32), supervised, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [rows]."""
        return np.diff(self.offsets)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(token ids int32 [L], positions of the supervised tokens int64 [N]) of one row."""
        start, stop = int(self.offsets[index]), int(self.offsets[index + 1])
        return self.tokens[start:stop], np.flatnonzero(self.supervised[start:stop])

    def save(self, path: Path) -> None:
        save_file({"tokens": self.tokens, "supervised": self.supervised, "offsets": self.offsets}, path)

    @classmethod
    def load(cls, path: Path) -> "TokenRows":
        return cls(**load_file(path))
