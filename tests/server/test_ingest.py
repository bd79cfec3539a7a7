"""Files -> rows: what is taken, and what is refused with which words for which line."""

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from server.errors import MixloomError
from server.hub import HubSplit, fetch, write_rows
from server.ingest import parquet
from server.ingest.delimited import sniff_delimiter
from server.ingest.file import format_of, histogram, ingest
from server.render import Renderer
from tests.tiny import write_tiny_tokenizer


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    folder = tmp_path_factory.mktemp("base")
    write_tiny_tokenizer(folder)
    return Renderer(folder)


class Reader:
    """Ingests one file after another, and remembers nothing of them."""

    def __init__(self, folder: Path, renderer: Renderer):
        self.content, self.rows, self.renderer = folder / "content", folder / "rows.jsonl", renderer
        self.shape = ""
        self.lengths = np.empty(0)

    def __call__(self, data: bytes | str, name: str = "data.jsonl", **columns: str) -> list[dict[str, Any]]:
        self.content.write_bytes(data.encode() if isinstance(data, str) else data)
        form = format_of(self.content, name)
        self.shape, self.lengths = ingest(self.content, self.rows, form, columns, self.renderer)
        return [json.loads(line) for line in self.rows.read_text().splitlines()]

    def refusal(self, data: bytes | str, name: str = "data.jsonl", **columns: str) -> MixloomError:
        with pytest.raises(MixloomError) as caught:
            self(data, name, **columns)
        return caught.value


@pytest.fixture
def read(tmp_path: Path, renderer: Renderer) -> Reader:
    return Reader(tmp_path, renderer)


def jsonl(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_parquet(path: Path, **columns: Any) -> bytes:
    pq.write_table(pa.table(columns), path)
    return path.read_bytes()


GOOD = {"prompt": "a", "completion": "b"}
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


# What is taken


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


# What is refused


@pytest.mark.parametrize(
    ("line", "column", "said"),
    [
        ({"prompt": "a"}, "completion", "is missing"),
        ({"completion": "a"}, "prompt", "is missing"),
        ({"prompt": "a", "completion": None}, "completion", "is missing"),
        ({"prompt": "a", "completion": ""}, "completion", "is empty"),
        ({"prompt": "a", "completion": " \n"}, "completion", "is empty"),
        ({"prompt": "", "completion": "a"}, "prompt", "is empty"),
        ({"prompt": 3, "completion": "a"}, "prompt", "must be text, it is a number"),
        ({"prompt": "a", "completion": ["b"]}, "completion", "must be text, it is a list"),
        ({**GOOD, "raw": "yes"}, "raw", "must be true or false"),
        ({**GOOD, "note": "a\0b"}, "note", "holds U+0000"),
        ({**GOOD, "note": {"deep": ["\ud800"]}}, "note", "holds U+D800"),
        (b'{"prompt": "\\ud83d", "completion": "b"}', "prompt", "holds U+D83D"),
        (b'{"prompt": "a", "completion": "b", "n": NaN}', None, "holds NaN"),
        (b'{"prompt": "a", "completion": "b", "n": -Infinity}', None, "holds -Infinity"),
        (b'{"prompt": "a", "completion": "b", "n": 1e999}', "n", "holds inf"),
        (b'{"prompt": "a", "completion": "b", "n": ' + b"9" * 5000 + b"}", None, "5000 digits"),
        (b'{"prompt": "a", "prompt": "b", "completion": "c"}', None, "has the key 'prompt' twice"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b', "prompt": "a", "completion": "b"}', "a", "nested more than"),
        (b"[" * 100_000, None, "nested more than"),
        (b'["a", "b"]', None, "is not an object"),
        (b"null", None, "is not an object"),
        (b'{"prompt": "a", "completion": }', None, "is not JSON: Expecting value at character 31"),
        (b"prompt: a", None, "is not JSON"),
        (b'{"prompt": "\xe9", "completion": "b"}', None, "is not UTF-8: byte 0xe9 at offset 48"),
    ],
)
def test_a_bad_row_is_named_with_line_column_and_reason(read: Reader, line: Any, column: str | None, said: str) -> None:
    bad = line if isinstance(line, bytes) else json.dumps(line).encode()
    good = json.dumps(GOOD).encode()
    error = read.refusal(b"\n".join([good, b"", bad, good]))
    assert (error.code, error.status, error.param) == ("invalid_rows", 422, "file")
    assert [(detail.line, detail.column) for detail in error.details] == [(3, column)]
    assert said in error.details[0].message
    assert said in error.message


@pytest.mark.parametrize(
    ("row", "column", "said"),
    [
        ({"instruction": "", "input": " ", "output": "a"}, "instruction", "is empty, and so is input"),
        ({"instruction": "a", "input": 3, "output": "b"}, "input", "must be text"),
        ({"instruction": "a", "output": ""}, "output", "is empty"),
        ({"text": ""}, "text", "is empty"),
        ({"text": {"a": "b"}}, "text", "must be text, it is an object"),
        ({"messages": "a"}, "messages", "must be a list"),
        ({"messages": []}, "messages", "must be a list"),
        ({"messages": ["a"]}, "messages", "number 1: it must be an object"),
        ({"messages": TALK[:1]}, "messages", "no assistant message"),
        ({"messages": TALK[1:]}, "messages", "begins with the assistant"),
        ({"messages": [TALK[0], {**TALK[1], "weight": 0}]}, "messages", "no assistant message"),
        ({"messages": [TALK[0], {**TALK[1], "weight": 0.5}]}, "messages", "weight must be 0 or 1"),
        ({"messages": [TALK[0], {**TALK[1], "weight": True}]}, "messages", "weight must be 0 or 1"),
        ({"messages": [{**TALK[0], "weight": 1}, TALK[1]]}, "messages", "only the assistant's"),
        (
            {"messages": [{"role": "bot", "content": "a"}, TALK[1]]},
            "messages",
            "role must be system, user or",
        ),
        ({"messages": [{"role": "user"}, TALK[1]]}, "messages", "its content is missing"),
        ({"messages": [TALK[0], {"role": "assistant", "content": ""}]}, "messages", "its content is empty"),
        ({"messages": [TALK[0], {**TALK[1], "tool_calls": []}]}, "messages", "'tool_calls'"),
        ({"messages": TALK, "raw": True}, "raw", "only a template can write messages"),
    ],
)
def test_each_shape_has_its_own_rules(read: Reader, row: dict[str, Any], column: str, said: str) -> None:
    error = read.refusal(jsonl(row))
    assert [(detail.line, detail.column) for detail in error.details] == [(1, column)]
    assert said in error.details[0].message


def test_a_row_of_another_shape_than_most_is_bad(read: Reader) -> None:
    error = read.refusal(jsonl(GOOD, {"text": "a"}, GOOD))
    assert [(detail.line, detail.column) for detail in error.details] == [(2, "prompt")]


def test_the_first_20_bad_lines_are_named(read: Reader) -> None:
    error = read.refusal(jsonl(*[GOOD, {"prompt": "a"}] * 1500))
    assert [detail.line for detail in error.details] == list(range(2, 42, 2))
    assert error.message.startswith("20 or more rows are bad")


def test_bad_lines_of_all_kinds_are_named_in_their_order(read: Reader) -> None:
    error = read.refusal(jsonl({"prompt": "a"}) + "nonsense\n" + jsonl(GOOD, {"prompt": "", "completion": "b"}))
    assert [detail.line for detail in error.details] == [1, 2, 4]


def test_a_bad_column_is_named_as_the_file_names_it(read: Reader) -> None:
    error = read.refusal("question;answer\nWhy?;\n", "a.csv", prompt="question", completion="answer")
    assert [(detail.line, detail.column) for detail in error.details] == [(2, "answer")]


def test_csv_lines_are_those_that_a_record_begins_at(read: Reader) -> None:
    error = read.refusal(
        b'prompt,completion\n"two\nlines",good\n\n"again\ntwo",\na,b,c\nd\nf\xff,g\n"never closed,h\ni,j',
        "a.csv",
    )
    assert [(detail.line, detail.column) for detail in error.details] == [
        (5, "completion"),
        (7, None),
        (8, None),
        (9, None),
        (10, None),
    ]
    said = [detail.message for detail in error.details]
    assert said[1].startswith("has 3 fields, the header has 2")
    assert said[2].startswith("has 1 fields")
    assert "0xff" in said[3]
    assert "never closed" in said[4]


def test_a_header_that_names_a_column_twice_is_refused(read: Reader) -> None:
    error = read.refusal("text,text\na,b\n", "a.csv")
    assert [(detail.line, detail.column) for detail in error.details] == [(1, "text")]


@pytest.mark.parametrize(
    ("data", "name"), [("", "a.jsonl"), ("\n \n", "a.jsonl"), ("", "a.csv"), ("prompt,completion\n", "a.csv")]
)
def test_an_empty_file_is_refused(read: Reader, data: str, name: str) -> None:
    error = read.refusal(data, name)
    assert (error.code, error.status, error.param) == ("empty_dataset", 422, "file")


def test_an_empty_parquet_file_is_refused(read: Reader, tmp_path: Path) -> None:
    data = as_parquet(tmp_path / "x.parquet", text=pa.array([], pa.string()))
    assert read.refusal(data, "x.parquet").code == "empty_dataset"


@pytest.mark.parametrize(
    ("row", "suggestion"),
    [
        ({"id": 1, "question": "a", "answer": "b"}, {"prompt": "question", "completion": "answer"}),
        ({"input": "a", "output": "b"}, {"prompt": "input", "completion": "output"}),
        (
            {"instruction": "a", "context": "b", "response": "c"},
            {"prompt": "instruction", "completion": "response"},
        ),
        ({"Frage": "a", "Antwort": "b", "n": 3}, {"prompt": "Frage", "completion": "Antwort"}),
        ({"tweet": "a", "label": "b"}, {"prompt": "tweet", "completion": "label"}),
        ({"query": "a", "sql": "b"}, {"prompt": "query", "completion": "sql"}),
        ({"body": "a", "n": 1}, {"text": "body"}),
    ],
)
def test_unknown_columns_are_named_with_a_renaming_that_works(
    read: Reader, row: dict[str, Any], suggestion: dict[str, str]
) -> None:
    error = read.refusal(jsonl(row))
    assert (error.code, error.status, error.param) == ("unknown_columns", 422, "columns")
    assert all(f"'{name}'" in error.message for name in row)
    assert f"columns={json.dumps(suggestion)}" in error.message
    assert read(jsonl(row), **suggestion)


def test_a_file_without_any_text_gets_the_shapes_told(read: Reader) -> None:
    error = read.refusal(jsonl({"n": 1}))
    assert error.code == "unknown_columns"
    assert "messages" in error.message


def test_columns_that_the_file_has_not_are_named(read: Reader) -> None:
    error = read.refusal(jsonl({"question": "a", "answer": "b"}), prompt="qestion", completion="answer")
    assert error.code == "unknown_columns"
    assert "no column 'qestion'" in error.message


def test_columns_of_two_shapes_at_once_are_refused(read: Reader) -> None:
    error = read.refusal(jsonl({"a": "a", "b": "b"}), prompt="a", text="b")
    assert (error.code, error.param) == ("invalid_columns", "columns")


def test_what_is_no_parquet_is_refused(read: Reader, tmp_path: Path) -> None:
    good = as_parquet(tmp_path / "x.parquet", text=["a" * 100] * 100)
    for data in (b"text\na\n", b"PAR1", good[:-20]):
        error = read.refusal(data, "x.parquet")
        assert (error.code, error.param) == ("unreadable_file", "file")


def test_parquet_values_that_json_cannot_hold_are_refused(read: Reader, tmp_path: Path) -> None:
    error = read.refusal(as_parquet(tmp_path / "x.parquet", text=["a", "b"], image=[None, b"\x89"]), "x.parquet")
    assert [(detail.line, detail.column) for detail in error.details] == [(2, "image")]
    error = read.refusal(as_parquet(tmp_path / "y.parquet", text=["a"], n=[float("nan")]), "y.parquet")
    assert [(detail.line, detail.column) for detail in error.details] == [(1, "n")]


def test_parquet_texts_that_are_not_utf_8_are_refused(read: Reader, tmp_path: Path) -> None:
    data = as_parquet(tmp_path / "x.parquet", text=["good", "b@d"])
    assert data.count(b"b@d") > 0
    error = read.refusal(data.replace(b"b@d", b"b\xe9d"), "x.parquet")
    assert [(detail.line, detail.message) for detail in error.details] == [(2, "is not UTF-8: byte 0xe9 in a text")]


@pytest.mark.parametrize("encoded", [False, True])
def test_a_parquet_file_that_decodes_to_far_more_than_it_has_is_refused(
    read: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoded: bool
) -> None:
    column = pa.array(["x" * 10_000] * 5000)
    data = as_parquet(tmp_path / "x.parquet", text=column.dictionary_encode() if encoded else column)
    assert len(data) < 100_000
    monkeypatch.setattr(parquet, "MAX_DECODED_BYTES", 10**6)
    error = read.refusal(data, "x.parquet")
    assert (error.code, error.status) == ("dataset_too_large", 413)


def test_messages_need_a_template(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path, template=False)
    error = Reader(tmp_path, Renderer(tmp_path)).refusal(jsonl({"messages": TALK}))
    assert (error.code, error.param) == ("no_chat_template", "messages")


def test_what_a_template_refuses_is_a_bad_row(tmp_path: Path) -> None:
    write_tiny_tokenizer(
        tmp_path,
        template="{% if messages[0].role == 'system' %}{{ raise_exception('No system turn') }}{% endif %}"
        "{% for message in messages %}{{ message.content }}{% endfor %}",
    )
    system = [{"role": "system", "content": "s"}, *TALK]
    error = Reader(tmp_path, Renderer(tmp_path)).refusal(jsonl({"messages": TALK}, {"messages": system}))
    assert [(detail.line, detail.column) for detail in error.details] == [(2, "messages")]
    assert "No system turn" in error.details[0].message


# The hub


def test_a_split_is_streamed_to_json_lines_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    as_parquet(tmp_path / "set" / "train.parquet", text=["a", "é", "c"], day=[datetime.date(2024, 1, 2)] * 3)
    target = tmp_path / "rows.jsonl"
    whole = HubSplit(str(tmp_path / "set"), None, "train", None)
    assert write_rows(whole, target, 10**6)
    assert [json.loads(line)["text"] for line in target.read_text().splitlines()] == ["a", "é", "c"]
    assert write_rows(HubSplit(str(tmp_path / "set"), None, "train[:2]", None), target, 10**6)
    assert len(target.read_text().splitlines()) == 2
    assert not write_rows(whole, target, 50)


@pytest.mark.parametrize(
    "name",
    [
        "squad",
        "../etc/passwd",
        "org/..",
        "org/a/b",
        "https://hub/x",
        "org/na me",
        "-org/name",
        "/org",
        "a/b\n",
        "",
    ],
)
def test_a_hub_name_is_an_organisation_and_a_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(MixloomError) as caught:
        fetch(HubSplit(name, None, "train", None), tmp_path / "rows.jsonl", 10**6)
    assert (caught.value.code, caught.value.param) == ("invalid_hub_name", "hub")


@pytest.mark.parametrize("split", ["train[5:]", "train[:10%]", "", "a b", "train+test"])
def test_a_split_is_a_name_or_its_first_rows(tmp_path: Path, split: str) -> None:
    with pytest.raises(MixloomError) as caught:
        fetch(HubSplit("org/name", None, split, None), tmp_path / "rows.jsonl", 10**6)
    assert (caught.value.code, caught.value.param) == ("invalid_split", "split")


def test_a_hub_out_of_reach_is_said_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MixloomError) as caught:
        fetch(HubSplit("org/name", None, "train", None), tmp_path / "rows.jsonl", 10**6)
    assert (caught.value.code, caught.value.status, caught.value.param) == ("hub_unavailable", 422, "hub")
    assert "ConnectError" in caught.value.message
    assert "\n" not in caught.value.message
