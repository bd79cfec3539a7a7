"""Safetensors of strangers: what is refused, and that what is kept is what the library would write."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from server.adapter_files.safetensors import read_header, write_float32

MAX = 2**16


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"b.weight": (3, 5), "a.weight": (700, 1000), "ä": (7,), "empty": (0, 4), "one": ()}
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}


def packed(header: Any, data: bytes = b"") -> bytes:
    """A file with this header, be it text or a value."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_in_any_type_becomes_what_the_library_writes_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    stored = tensors(dtype)
    file = io.BytesIO(save(stored, metadata={"format": "pt"}))
    found = read_header(file, MAX)
    assert {name: one.shape for name, one in found.items()} == {name: list(t.shape) for name, t in stored.items()}
    write_float32(file, found, tmp_path / "w")
    assert (tmp_path / "w").read_bytes() == save({name: tensor.float() for name, tensor in stored.items()})
    assert all(torch.equal(tensor, stored[name].float()) for name, tensor in load_file(tmp_path / "w").items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_finite_number_is_refused_by_its_tensors_name(
    value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    stored = tensors(dtype)
    stored["a.weight"][699, 999] = value
    file = io.BytesIO(save(stored))
    with pytest.raises(ValueError, match=r"a\.weight.*not a number"):
        write_float32(file, read_header(file, MAX), tmp_path / "w")


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


FILES: dict[str, bytes] = {
    "nothing": b"",
    "seven bytes": b"1234567",
    "an empty header": packed(b""),
    "a header longer than the file": (2**40).to_bytes(8, "little") + b"{}",
    "a header of most of 2^64 bytes": (2**64 - 1).to_bytes(8, "little") + b"{}",
    "a header longer than may be": packed({"a" * MAX: entry()}, bytes(8)),
    "a zip": b"PK\x03\x04" + bytes(100),
    "a pickle": b"\x80\x02}q\x00." + bytes(100),
    "not UTF-8": packed(b'{"\xff": 1}'),
    "not JSON": packed(b"{]"),
    "a list": packed([]),
    "a key twice": packed(b'{"a": {}, "a": {}}'),
    "nested without end": packed(b'{"a":' * 10_000),
    "a number without end": packed(b'{"a": ' + b"9" * 5000 + b"}"),
    "no entry": packed({"a": None}),
    "an entry with more": packed({"a": entry(more=1)}, bytes(8)),
    "an entry with less": packed({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "float64": packed({"a": entry("F64", (1,))}, bytes(8)),
    "whole numbers": packed({"a": entry("I32")}, bytes(8)),
    "an unknown type": packed({"a": entry("F3")}, bytes(8)),
    "a negative width": packed({"a": entry(shape=(-2, -1))}, bytes(8)),
    "a width that is true": packed({"a": entry(shape=(True, 2))}, bytes(8)),
    "a width with a fraction": packed({"a": entry(shape=(2.0,))}, bytes(8)),
    "a shape as a text": packed({"a": entry(shape="2")}, bytes(8)),
    "more values than there are atoms": packed({"a": entry(shape=(10**30, 10**30))}, bytes(8)),
    "an offset before the data": packed({"a": entry(offsets=(-8, 0))}, bytes(8)),
    "an offset that is true": packed({"a": entry(shape=(0,), offsets=(False, False))}),
    "three offsets": packed({"a": entry(offsets=(0, 4, 8))}, bytes(8)),
    "beyond the end": packed({"a": entry()}, bytes(7)),
    "bytes that no tensor has": packed({"a": entry()}, bytes(9)),
    "bytes between two tensors": packed({"a": entry(), "b": entry(offsets=(9, 17))}, bytes(17)),
    "two tensors in one place": packed({"a": entry(), "b": entry()}, bytes(8)),
    "two that overlap": packed({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_a_file_that_is_not_wholly_in_order_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"^(it|'|its)"):
        read_header(io.BytesIO(content), MAX)


@given(data=st.data())
def test_whatever_is_changed_in_a_file_its_tensors_fill_it_or_it_is_refused(data: st.DataObject) -> None:
    content = bytearray(save({"a": torch.ones(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}))
    places: Callable[[], int] = lambda: data.draw(st.integers(0, len(content) - 1))  # noqa: E731
    for _ in range(data.draw(st.integers(1, 3))):
        content[places()] = data.draw(st.integers(0, 255))
    content = content[: places()] if data.draw(st.booleans()) else content
    try:
        found = read_header(io.BytesIO(bytes(content)), MAX)
    except ValueError:
        return
    assert sum(one.stop - one.start for one in found.values()) == len(content) - min(
        (one.start for one in found.values()), default=len(content)
    )
    assert all(one.stop <= len(content) for one in found.values())
    assert all(math.prod(one.shape) <= np.prod((len(content),)) for one in found.values())
