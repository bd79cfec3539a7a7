"""Files that are refused whole: with which words, for which line."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from server.ingest import parquet
from server.render import Renderer
from tests.server.ingest.reading import GOOD, TALK, Reader, as_parquet, jsonl
from tests.tiny import write_tiny_tokenizer


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
