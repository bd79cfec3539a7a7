"""The routes of data sets, over the real app."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi import FastAPI
from httpx import Response

from server.api.rendering import renderer_for
from server.api.services import Services
from server.db.tables import Base
from server.render import render_rows
from tests.server.conftest import Caller

ROWS = [{"prompt": f"What is {n}?", "completion": str(n), "n": n} for n in range(30)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)


def upload(caller: Caller, data: bytes | str, file_name: str = "data.jsonl", **fields: str) -> Response:
    return caller.post("/datasets", files={"file": (file_name, data)}, data=fields)


def refused(answer: Response, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param), error
    return error


def kept(services: Services) -> list[str]:
    """Everything that is left of data sets in the store, unfinished folders among them."""
    folder = services.store.path("datasets")
    return [child.name for child in folder.iterdir()] if folder.exists() else []


def test_an_upload_is_answered_with_its_rows_tokens_and_hash(alice: Caller, base: Base, services: Services) -> None:
    answer = upload(alice, JSONL, "numbers.jsonl")
    assert answer.status_code == 201, answer.text
    body = answer.json()
    assert answer.headers["Location"] == f"/datasets/{body['id']}"
    assert body["id"].startswith("ds_")
    assert {name: body[name] for name in ("object", "status", "name", "format", "shape", "rows", "bytes")} == {
        "object": "dataset",
        "status": "processed",
        "name": "numbers.jsonl",
        "format": "jsonl",
        "shape": "prompt_completion",
        "rows": 30,
        "bytes": len(JSONL),
    }
    assert body["sha256"] == hashlib.sha256(JSONL.encode()).hexdigest()
    rendered = render_rows(renderer_for(services, base), ROWS, "completion")
    assert body["tokens"]["total"] == sum(len(row.tokens) for row in rendered)
    assert sum(body["tokens"]["histogram"]["counts"]) == 30
    assert alice.get(f"/datasets/{body['id']}").json() == body


def test_a_strangers_csv_needs_its_columns_named(alice: Caller, base: Base, services: Services) -> None:
    data = "question;answer\nWhy, then?;Because.\n"
    error = refused(upload(alice, data, "faq.csv"), 422, "unknown_columns", "columns")
    assert "'question', 'answer'" in error["message"]
    columns = error["message"].partition("columns=")[2].partition("}")[0] + "}"
    body = upload(alice, data, "faq.csv", columns=columns, name="FAQ").json()
    assert (body["name"], body["format"], body["columns"]) == ("FAQ", "csv", json.loads(columns))
    row = alice.get(f"/datasets/{body['id']}/rows").json()["data"][0]["row"]
    assert row == {"prompt": "Why, then?", "completion": "Because."}
    assert len(kept(services)) == 1


def test_parquet_is_taken(alice: Caller, base: Base) -> None:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": ["a", "b"]}), file)
    body = upload(alice, file.getvalue(), "texts").json()
    assert (body["format"], body["shape"], body["rows"]) == ("parquet", "text", 2)


def test_rows_come_in_pages_with_their_tokens(alice: Caller, base: Base) -> None:
    dataset_id = upload(alice, JSONL).json()["id"]
    pages, after = [], {}
    while True:
        page = alice.get(f"/datasets/{dataset_id}/rows", params={"limit": 13, **after}).json()
        pages.append(page)
        if not page["has_more"]:
            break
        after = {"after": page["last_id"]}
    assert [len(page["data"]) for page in pages] == [13, 13, 4]
    assert [item["row"] for page in pages for item in page["data"]] == ROWS
    assert [item["id"] for page in pages for item in page["data"]] == [str(n) for n in range(30)]
    total = sum(item["tokens"] for page in pages for item in page["data"])
    assert total == alice.get(f"/datasets/{dataset_id}").json()["tokens"]["total"]
    refused(alice.get(f"/datasets/{dataset_id}/rows?after=30"), 400, "unknown_cursor", "after")
    refused(alice.get(f"/datasets/{dataset_id}/rows?limit=101"), 422, "invalid_request", "limit")


def test_content_is_the_file_byte_for_byte(alice: Caller, base: Base) -> None:
    data = b'\xef\xbb\xbftext\r\n"a\r\nb"\r\n'
    body = upload(alice, data, "ein täxt.csv").json()
    answer = alice.get(f"/datasets/{body['id']}/content")
    assert answer.content == data
    assert answer.headers["ETag"] == f'"{hashlib.sha256(data).hexdigest()}"'
    assert answer.headers["Content-Type"].startswith("text/csv")
    assert "ein%20t%C3%A4xt.csv" in answer.headers["Content-Disposition"]


def test_lists_hold_what_fits_the_filters(alice: Caller, base: Base) -> None:
    ids = [upload(alice, JSONL, name=f"{n}.jsonl").json()["id"] for n in range(3)]
    assert [item["id"] for item in alice.get("/datasets").json()["data"]] == ids[::-1]
    page = alice.get("/datasets", params={"limit": 2, "order": "asc"}).json()
    assert ([item["id"] for item in page["data"]], page["has_more"]) == (ids[:2], True)
    rest = alice.get("/datasets", params={"order": "asc", "after": page["last_id"]}).json()
    assert ([item["id"] for item in rest["data"]], rest["has_more"]) == (ids[2:], False)
    assert [item["id"] for item in alice.get("/datasets?name=1.jsonl").json()["data"]] == [ids[1]]
    assert alice.get("/datasets?status=failed").json()["data"] == []
    refused(alice.get("/datasets?after=ds_0"), 400, "unknown_cursor", "after")


def test_a_tenants_data_sets_have_no_more_than_its_quota_together(
    alice: Caller, bob: Caller, base: Base, services: Services
) -> None:
    file = 3 * (json.dumps({"text": "a", "notes": "a" * 100_000}) + "\n")  # of which a MiB holds three
    services.settings.max_datasets_mib = 1
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda number: upload(alice, file, f"{number}.jsonl"), range(6)))
    assert sorted(answer.status_code for answer in answers) == [201] * 3 + [413] * 3
    error = refused(next(answer for answer in answers if answer.status_code == 413), 413, "datasets_too_large")
    assert "may have 1 MiB together; they have 0.86, and this one has 0.29" in error["message"]
    assert len(kept(services)) == 3
    assert alice.get("/me").json()["quotas"] == {"dataset_bytes": {"used": 3 * len(file), "limit": 2**20}}
    assert upload(bob, file).status_code == 201  # another tenant's are not counted
    alice.delete(f"/datasets/{alice.get('/datasets').json()['last_id']}")
    assert upload(alice, file).status_code == 201


def test_a_deleted_data_set_is_gone_with_its_files(alice: Caller, base: Base, services: Services) -> None:
    dataset_id = upload(alice, JSONL).json()["id"]
    assert alice.delete(f"/datasets/{dataset_id}").json() == {
        "id": dataset_id,
        "object": "dataset",
        "deleted": True,
    }
    assert kept(services) == []
    refused(alice.get(f"/datasets/{dataset_id}"), 404, "not_found")
    refused(alice.delete(f"/datasets/{dataset_id}"), 404, "not_found")


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("DELETE", ""), ("GET", "/rows"), ("GET", "/content")])
def test_anothers_data_set_is_as_if_it_never_was(
    alice: Caller, bob: Caller, base: Base, method: str, path: str
) -> None:
    foreign = upload(alice, JSONL).json()["id"]
    absent = "ds_" + "0" * 32
    answers = [bob.request(method, f"/datasets/{id_}{path}") for id_ in (foreign, absent)]
    errors = [refused(answer, 404, "not_found") for answer in answers]
    for error, id_ in zip(errors, (foreign, absent), strict=True):
        del error["request_id"]
        error["message"] = error["message"].replace(id_, "ID")
    assert errors[0] == errors[1]
    assert bob.get("/datasets").json()["data"] == []
    refused(bob.get(f"/datasets?after={foreign}"), 400, "unknown_cursor", "after")
    assert alice.get(f"/datasets/{foreign}").status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/datasets"),
        ("GET", "/datasets"),
        ("GET", "/datasets/ds_0"),
        ("DELETE", "/datasets/ds_0"),
        ("GET", "/datasets/ds_0/rows"),
        ("GET", "/datasets/ds_0/content"),
    ],
)
def test_every_route_needs_a_tenants_key(
    anonymous: Caller, admin: Caller, app: FastAPI, method: str, path: str
) -> None:
    refused(anonymous.request(method, path), 401, "invalid_api_key")
    refused(Caller(app, "mxl_wrong").request(method, path), 401, "invalid_api_key")
    refused(admin.request(method, path), 403, "tenant_key_required")


def test_a_bad_file_is_refused_whole_and_leaves_nothing(alice: Caller, base: Base, services: Services) -> None:
    error = refused(upload(alice, JSONL + '{"prompt": "a"}\n'), 422, "invalid_rows", "file")
    assert error["details"] == [{"line": 31, "column": "completion", "message": "is missing"}]
    refused(upload(alice, b""), 422, "empty_dataset", "file")
    assert kept(services) == []
    assert alice.get("/datasets").json()["data"] == []


def test_messages_need_a_base_with_a_template(alice: Caller, publish_base: Callable[..., Base]) -> None:
    publish_base(template=False)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    refused(upload(alice, json.dumps({"messages": talk})), 422, "no_chat_template", "messages")
    assert upload(alice, JSONL).status_code == 201


def test_there_is_nothing_to_count_with_before_a_base_is_there(alice: Caller) -> None:
    answer = upload(alice, JSONL)
    refused(answer, 503, "base_not_ready")
    assert answer.headers["Retry-After"]


def test_a_base_published_anew_with_another_template_is_read_anew(
    alice: Caller, publish_base: Callable[..., Base]
) -> None:
    publish_base(template=True)
    with_template = upload(alice, JSONL).json()["tokens"]["total"]
    publish_base(template=False)
    assert upload(alice, JSONL).json()["tokens"]["total"] < with_template


def test_nothing_is_counted_with_a_tokenizer_that_is_not_what_was_published(
    alice: Caller, publish_base: Callable[..., Base], services: Services
) -> None:
    file = services.store.path(publish_base().folder_key) / "tokenizer.json"
    whole = file.read_text()
    for damage in (lambda: file.write_text(whole.replace("user", "uSer")), lambda: shutil.rmtree(file.parent)):
        damage()
        answer = upload(alice, JSONL)
        refused(answer, 503, "base_not_ready")
        assert "not what was published" in answer.json()["error"]["message"]
    publish_base()
    assert upload(alice, JSONL).status_code == 201


def test_too_large_a_file_is_refused(alice: Caller, base: Base, services: Services) -> None:
    row = json.dumps({"text": "x" * 1000}) + "\n"
    services.settings.max_upload_mib = 1
    error = refused(upload(alice, row * 1050), 413, "dataset_too_large", "file")
    assert "1 MiB" in error["message"]
    refused(upload(alice, row * 3000), 413, "dataset_too_large", "file")
    assert kept(services) == []


def test_unknown_and_bad_fields_are_refused_by_name(alice: Caller, base: Base) -> None:
    refused(upload(alice, JSONL, colour="red"), 422, "unknown_field", "colour")
    refused(upload(alice, JSONL, columns="prompt=q"), 422, "invalid_columns", "columns")
    refused(upload(alice, JSONL, columns='{"prompt": 3}'), 422, "invalid_request", "columns.prompt")
    refused(upload(alice, JSONL, columns='{"question": "prompt"}'), 422, "invalid_columns", "columns")
    refused(upload(alice, JSONL, name="x" * 201), 422, "invalid_request", "name")
    refused(alice.post("/datasets", files={"data": ("a", JSONL)}), 422, "missing_field", "file")
    refused(alice.post("/datasets", data={"file": JSONL}), 415, "unsupported_media_type")
    refused(alice.post("/datasets", content=JSONL), 415, "unsupported_media_type")
    two = [("file", ("a", JSONL)), ("file", ("b", JSONL))]
    refused(alice.post("/datasets", files=two), 400, "invalid_body")
    refused(
        alice.post("/datasets", files={"file": ("a", JSONL)}, headers={"Content-Encoding": "gzip"}),
        415,
        "unsupported_encoding",
    )


def test_file_names_are_labels_and_lead_nowhere(alice: Caller, base: Base, services: Services) -> None:
    body = upload(alice, JSONL, "../../../etc/passwd").json()
    assert body["source"] == {"file": "passwd"}
    assert kept(services) == [body["id"]]
    assert alice.get(f"/datasets/{body['id']}/content").text == JSONL


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"hub": "squad"}, "invalid_hub_name", "hub"),
        ({"hub": "org/name", "split": "train[10%:]"}, "invalid_split", "split"),
        ({"hub": "org/name", "revision": ""}, "invalid_request", "revision"),
        ({"hub": "org/name", "config": "a\nb"}, "invalid_request", "config"),
        ({"hub": 3}, "invalid_request", "hub"),
        ({"hub": "org/name", "trust_remote_code": True}, "unknown_field", "trust_remote_code"),
        ({}, "missing_field", "hub"),
    ],
)
def test_a_hub_set_that_is_none_is_refused(
    alice: Caller, base: Base, services: Services, body: dict[str, Any], code: str, param: str
) -> None:
    refused(alice.post("/datasets", json=body), 422, code, param)
    assert kept(services) == []


def test_a_body_that_is_not_json_is_refused(alice: Caller, base: Base) -> None:
    json_type = {"Content-Type": "application/json"}
    refused(alice.post("/datasets", content=b"{", headers=json_type), 422, "invalid_json")
    refused(alice.post("/datasets", content=b'{"hub": NaN}', headers=json_type), 422, "invalid_json")
    refused(alice.post("/datasets", content=b'{"hub": "\\ud800"}', headers=json_type), 422, "invalid_json")


def test_a_hub_out_of_reach_is_the_callers_to_know(
    alice: Caller, base: Base, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    error = refused(alice.post("/datasets", json={"hub": "org/name"}), 422, "hub_unavailable", "hub")
    assert "upload the rows as a file" in error["message"]
    assert kept(services) == []
