"""Data sets of the hub: what a name and a split may be, and how a failure is told."""

import datetime
import json
from pathlib import Path

import pytest

from server.errors import MixloomError
from server.hub import HubSplit, fetch, write_rows
from tests.server.ingest.reading import as_parquet


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
