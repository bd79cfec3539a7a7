"""Files -> rows: what is taken."""

import datetime
import decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from server.ingest.delimited import sniff_delimiter
from server.ingest.file import format_of, histogram
from server.render import Renderer
from tests.server.ingest.reading import GOOD, TALK, Reader, as_parquet, jsonl


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"messages": TALK}, "messages"),
        (GOOD, "prompt_completion"),
        ({"instruction": "a", "input": "b", "output": "c"}, "instruction"),
        ({"instruction": "a", "output": "c"}, "instruction"),
        ({"instruction": "", "input": "b", "output": "c"}, "instruction"),
        ({"instruction": "a", "input": None, "output": "c"}, "instruction"),
        ({"text": "a"}, "text"),
    ],
)
def test_each_shape_is_recognised_and_its_tokens_are_counted(
    read: Reader, renderer: Renderer, row: dict[str, Any], shape: str
) -> None:
    assert read(jsonl(row, row)) == [row, row]
    assert read.shape == shape
    assert read.lengths.tolist() == [len(renderer.training(row, supervise="all").tokens)] * 2


def test_other_columns_are_kept(read: Reader) -> None:
    row = {**GOOD, "answer": 3, "tags": ["x", {"y": None}], "text": "kept"}
    assert read(jsonl(row)) == [row]
    assert read.shape == "prompt_completion"


def test_a_column_that_would_give_a_row_another_shape_than_asked_for_goes(read: Reader) -> None:
    rows = read(jsonl({**GOOD, "body": "the text"}), text="body")
    assert read.shape == "text"
    assert rows == [{"text": "the text", "prompt": "a"}]


def test_a_byte_order_mark_blank_lines_and_windows_line_ends_are_no_matter(read: Reader) -> None:
    assert read(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}') == [{"text": "a"}, {"text": "b"}]
    assert read(b"\xef\xbb\xbftext\r\n\r\na\r\n", "data.csv") == [{"text": "a"}]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_of_each_dialect_with_quoted_delimiters_quotes_and_line_breaks(
    read: Reader, delimiter: str, end: str
) -> None:
    fields = [["prompt", "completion"], ['a "b", c; d', '"yes;\n""no"",\t"'], ["e, f; g, h", "i"]]
    fields = [[f'"{f.replace(chr(34), chr(34) * 2)}"' if "a " in f else f for f in row] for row in fields]
    fields[2][0] = f'"{fields[2][0]}"'
    rows = read(end.join(delimiter.join(row) for row in fields), "data.csv")
    assert rows == [
        {"prompt": 'a "b", c; d', "completion": 'yes;\n"no",\t'},
        {"prompt": "e, f; g, h", "completion": "i"},
    ]


def test_the_delimiter_is_the_one_that_divides_the_header(tmp_path: Path) -> None:
    for text, delimiter in [
        ("question;answer\na, b, c, d;e\nf, g;h\n", ";"),
        ("question,answer\na;b;c,d;e;f\n", ","),
        ("question\tanswer\n1,2,3\t4;5\n", "\t"),
        ("question, and more;answer\na;b\nc;d\n", ";"),
    ]:
        (tmp_path / "x.csv").write_text(text)
        assert sniff_delimiter(tmp_path / "x.csv") == delimiter, text


def test_a_csv_of_one_column_may_hold_commas(read: Reader) -> None:
    assert read("text\nhello, you\nand you\n", "data.csv") == [{"text": "hello, you"}, {"text": "and you"}]


def test_a_large_field_is_a_field(read: Reader) -> None:
    assert read("text\n" + "x" * 200_000, "data.csv") == [{"text": "x" * 200_000}]


def test_csv_says_raw_in_words(read: Reader) -> None:
    rows = read("prompt,completion,raw\na,b,True\nc,d,false\n", "data.csv")
    assert [row["raw"] for row in rows] == [True, False]


def test_parquet_rows_come_as_json_can_hold_them(read: Reader, tmp_path: Path) -> None:
    data = as_parquet(
        tmp_path / "x.parquet",
        prompt=["a", "b"],
        completion=pa.array(["c", "d"]).dictionary_encode(),
        day=[datetime.date(2024, 2, 29), None],
        price=[decimal.Decimal("1.50"), decimal.Decimal("2.00")],
        tags=[["x"], []],
    )
    assert read(data, "no-suffix") == [
        {"prompt": "a", "completion": "c", "day": "2024-02-29", "price": "1.50", "tags": ["x"]},
        {"prompt": "b", "completion": "d", "day": None, "price": "2.00", "tags": []},
    ]


def test_parquet_messages_have_null_for_what_a_message_has_not(read: Reader, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b"}]
    read(as_parquet(tmp_path / "x.parquet", messages=[messages]), "x.parquet")
    assert read.shape == "messages"


def test_columns_rename_what_the_file_calls_otherwise(read: Reader) -> None:
    data = "question;answer;id\nWhy?;Because.;1\n"
    assert read(data, "data.csv", prompt="question", completion="answer") == [
        {"prompt": "Why?", "completion": "Because.", "id": "1"}
    ]
    assert read(jsonl({"q": "a", "completion": "b"}), prompt="q") == [{"prompt": "a", "completion": "b"}]


def test_columns_may_be_swapped(read: Reader) -> None:
    assert read(jsonl(GOOD), prompt="completion", completion="prompt") == [{"prompt": "b", "completion": "a"}]


@pytest.mark.parametrize(
    ("name", "data", "form"),
    [
        ("a.JSONL", b"", "jsonl"),
        ("a.tsv", b"{", "csv"),
        ("a", b'\xef\xbb\xbf {"a": 1}', "jsonl"),
        ("a.txt", b"a,b", "csv"),
        ("a", b"PAR1...", "parquet"),
        ("a.parquet", b"a,b", "parquet"),
    ],
)
def test_the_format_is_told_by_the_name_or_else_by_the_beginning(
    tmp_path: Path, name: str, data: bytes, form: str
) -> None:
    (tmp_path / "x").write_bytes(data)
    assert format_of(tmp_path / "x", name) == form


def test_the_histogram_counts_every_row_once() -> None:
    for lengths in ([7], [5, 5, 5], [1, 21, 20], list(range(1000)), [1, 10**6]):
        found = histogram(np.array(lengths))
        assert sum(found["counts"]) == len(lengths)
        assert len(found["edges"]) == len(found["counts"]) + 1 <= 23
        assert found["edges"][0] <= min(lengths) <= max(lengths) < found["edges"][-1]
