"""Safetensors of strangers: a header that is trusted in nothing, and values read in small parts.

Knows no adapter. The library would map the file and build every tensor; this needs neither.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from server import strict_json

BYTES = {"F32": 4, "F16": 2, "BF16": 2}
"""Types that are taken."""
_CHUNK_VALUES = 2**18
_ALIGNMENT = 8


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: its bytes are `start` to `stop`."""

    dtype: str
    shape: list[int]
    start: int
    stop: int


def read_header(file: BinaryIO, max_bytes: int) -> dict[str, Stored]:
    """Every tensor of a file by its name. `max_bytes`: of the header, which is read whole.

    Raises ValueError with a sentence unless the tensors fill the file exactly, end to end, in types that are taken.
    """
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 2 <= length <= size - 8:
        raise ValueError("it does not begin with a header")
    if length > max_bytes:
        raise ValueError(f"its header has {length} bytes, more than the {max_bytes} that this config can need")
    try:
        header = strict_json.parse(file.read(length).decode())
    except UnicodeDecodeError:
        raise ValueError("its header is not UTF-8") from None
    except ValueError as error:
        raise ValueError(f"its header {error}") from None
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    header.pop("__metadata__", None)
    found = {name: _stored(name, entry, 8 + length) for name, entry in header.items()}
    place = 8 + length
    for name, stored in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if stored.start != place:
            raise ValueError(f"'{name[:200]}' does not begin where the tensor before it ends")
        place = stored.stop
    if place != size:
        raise ValueError(f"its tensors end at byte {place}, and the file has {size}")
    return found


def _stored(name: str, entry: Any, offset: int) -> Stored:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, stop]} if len(entry) == 3:
            pass
        case _:
            raise ValueError(f"'{name[:200]}' is not described by dtype, shape and data_offsets")
    if dtype not in BYTES:
        raise ValueError(f"'{name[:200]}' has type {dtype[:20]}; {', '.join(BYTES)} are taken")
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError(f"'{name[:200]}' has a shape or a place that is none")
    if stop - start != BYTES[dtype] * math.prod(shape):
        raise ValueError(f"'{name[:200]}' has not as many bytes as its shape needs")
    return Stored(dtype, shape, offset + start, offset + stop)


def write_float32(source: BinaryIO, tensors: Mapping[str, Stored], target: Path) -> None:
    """Copy a file's tensors in float32, into the bytes that the library would write.

    Raises ValueError naming a tensor that holds what is not a finite number.
    """
    with target.open("wb") as file:
        for part in _parts(source, tensors):
            file.write(part)


def _parts(source: BinaryIO, tensors: Mapping[str, Stored]) -> Iterator[bytes]:
    header, place = {}, 0
    for name, stored in sorted(tensors.items()):
        stop = place + 4 * math.prod(stored.shape)
        header[name] = {"dtype": "F32", "shape": stored.shape, "data_offsets": [place, stop]}
        place = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for name, stored in sorted(tensors.items()):
        source.seek(stored.start)
        for left in range(stored.start, stored.stop, _CHUNK_VALUES * BYTES[stored.dtype]):
            values = _float32(source.read(min(_CHUNK_VALUES * BYTES[stored.dtype], stored.stop - left)), stored.dtype)
            if not np.isfinite(values).all():
                raise ValueError(f"'{name}' holds values that are infinite or not a number")
            yield values.tobytes()


def _float32(part: bytes, dtype: str) -> np.ndarray:
    if dtype == "F32":
        return np.frombuffer(part, "<f4")
    if dtype == "F16":
        return np.frombuffer(part, "<f2").astype("<f4")
    return (np.frombuffer(part, "<u2").astype("<u4") << 16).view("<f4")  # BF16 is the upper half of a float32
