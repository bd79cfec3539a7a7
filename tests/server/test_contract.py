"""What holds on every route: tenants are invisible to each other, errors have one shape, lists are pages."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

import server
from server.api.middleware import JSON_BODY_BYTES
from server.api.services import Services
from server.db.tables import Base
from tests.server.conftest import ADMIN_KEY, Caller
from tests.server.making import add_adapter, prompt_rows, submit, upload

METHODS = ("get", "post", "patch", "put", "delete")
ABSENT = "absent_0000"


def tenant_routes(routes: FastAPI) -> list[tuple[str, str]]:
    """(method, path) of every route that names an object of a tenant."""
    return [
        (method, path)
        for path, operations in routes.openapi()["paths"].items()
        for method in operations
        if method in METHODS and "{" in path and not path.startswith("/admin")
    ]


@pytest.fixture
def own(alice: Caller, base: Base, services: Services) -> dict[str, str]:
    """The parameters of paths, filled with objects of alice."""
    dataset = upload(alice, prompt_rows(12))
    job = submit(alice, dataset)["id"]
    adapter = add_adapter(services, job, 1)
    return {"dataset_id": dataset, "job_id": job, "adapter_id": adapter, "name": "README.md"}


def test_a_foreign_object_is_the_same_404_as_an_absent_one(
    routes: FastAPI, own: dict[str, str], alice: Caller, bob: Caller
) -> None:
    tried = 0
    for method, path in tenant_routes(routes):
        absent = {name: "README.md" if name == "name" else ABSENT for name in own}
        foreign_answer, absent_answer = (bob.request(method, path.format(**names)) for names in (own, absent))
        assert foreign_answer.status_code == absent_answer.status_code == 404, (method, path)
        assert shape_of(foreign_answer.json(), own) == shape_of(absent_answer.json(), absent), (method, path)
        tried += 1
    assert tried >= 17
    for method, path in tenant_routes(routes):
        if method == "get":
            assert alice.get(path.format(**own)).status_code in (200, 422), path


def shape_of(answer: dict[str, Any], names: dict[str, str]) -> str:
    """An answer without the ids that the request itself named."""
    text = json.dumps({**answer["error"], "request_id": None})
    for name in names.values():
        text = text.replace(name, "ID")
    return text


def test_objects_named_in_a_body_are_invisible_as_well(own: dict[str, str], bob: Caller) -> None:
    mine = upload(bob, prompt_rows(12))
    for path, body in (
        ("/jobs", {"dataset": own["dataset_id"]}),
        ("/jobs", {"dataset": mine, "validation": own["dataset_id"]}),
        ("/jobs", {"from": own["job_id"]}),
        ("/jobs", {"dataset": mine, "init_from": own["adapter_id"]}),
        ("/generate", {"model": own["job_id"], "prompt": "a"}),
        ("/generate", {"model": own["adapter_id"], "prompt": "a"}),
    ):
        absent = {key: ABSENT if value in own.values() else value for key, value in body.items()}
        if path == "/generate":
            absent["model"] = body["model"][:4] + "0000"
        answers = [bob.post(path, json=one) for one in (body, absent)]
        assert [answer.status_code for answer in answers] == [404, 404], body
        names = [{"id": next(value for value in one.values() if value not in (mine, "a"))} for one in (body, absent)]
        assert shape_of(answers[0].json(), names[0]) == shape_of(answers[1].json(), names[1])


def test_lists_show_ones_own_objects_alone(own: dict[str, str], alice: Caller, bob: Caller) -> None:
    for path in ("/datasets", "/jobs", "/adapters"):
        assert len(alice.get(path).json()["data"]) == 1
        assert bob.get(path).json()["data"] == []
        cursor = alice.get(path).json()["last_id"]
        answer = bob.get(path, params={"after": cursor})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unknown_cursor")


def test_every_route_but_the_open_ones_asks_for_a_key(routes: FastAPI, app: FastAPI, anonymous: Caller) -> None:
    open_paths = {"/", "/healthz", "/readyz"}
    for path, operations in routes.openapi()["paths"].items():
        for method in set(operations) & set(METHODS):
            answer = anonymous.request(method, re.sub(r"{\w+}", "x", path))
            assert (answer.status_code == 401) == (path not in open_paths), (method, path, answer.text)


@pytest.fixture
def made(alice: Caller, base: Base) -> list[str]:
    """Seven jobs, in the order of their submission."""
    dataset = upload(alice, prompt_rows(12))
    return [str(submit(alice, dataset)["id"]) for _ in range(7)]


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_together_are_the_whole_list_in_order(order: str, made: list[str], alice: Caller) -> None:
    seen: list[str] = []
    params: dict[str, Any] = {"limit": 3, "order": order}
    for expected in (3, 3, 1):
        page = alice.get("/jobs", params=params).json()
        ids = [job["id"] for job in page["data"]]
        assert (page["object"], len(ids), page["has_more"]) == ("list", expected, expected == 3)
        assert (page["first_id"], page["last_id"]) == (ids[0], ids[-1])
        seen += ids
        params["after"] = page["last_id"]
    assert seen == (made if order == "asc" else made[::-1])


def test_a_page_goes_on_behind_an_object_that_the_filter_no_longer_passes(made: list[str], alice: Caller) -> None:
    params = {"limit": 3, "order": "asc", "status": "queued"}
    last = alice.get("/jobs", params=params).json()["last_id"]
    alice.post(f"/jobs/{last}/cancel")
    rest = alice.get("/jobs", params={**params, "after": last, "limit": 10}).json()["data"]
    assert [job["id"] for job in rest] == made[3:]


def test_an_empty_list_has_no_ids(alice: Caller) -> None:
    assert alice.get("/jobs").json() == {
        "object": "list",
        "data": [],
        "has_more": False,
        "first_id": None,
        "last_id": None,
    }


@pytest.mark.parametrize("path", ["/jobs", "/datasets", "/adapters"])
def test_an_unknown_cursor_is_400(path: str, alice: Caller) -> None:
    answer = alice.get(path, params={"after": ABSENT})
    assert (answer.status_code, answer.json()["error"]["code"], answer.json()["error"]["param"]) == (
        400,
        "unknown_cursor",
        "after",
    )


BODIES: dict[str, bytes] = {
    "not JSON": b"{",
    "NaN": b'{"name": NaN}',
    "infinity": b'{"name": "a", "share": 1e999}',
    "a key twice": b'{"name": "a", "name": "b"}',
    "nested without end": b"[" * 100_000,
    "objects without end": b'{"a":' * 100_000,
    "not UTF-8": b'{"name": "\xff"}',
    "half a surrogate": rb'{"name": "\ud800"}',
    "a NUL": rb'{"name": "\u0000"}',
    "a number without end": b'{"name": "a", "share": ' + b"9" * 10_000 + b"}",
    "a list": b"[]",
    "a text": b'"name"',
    "null": b"null",
    "nothing": b"",
}


@pytest.mark.parametrize("name", BODIES)
def test_a_broken_body_is_422_and_never_500(name: str, admin: Caller) -> None:
    answer = admin.post("/admin/tenants", content=BODIES[name], headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == 422, answer.text
    assert error["code"] in ("invalid_json", "invalid_body", "invalid_request")


def test_a_body_of_another_type_is_refused(admin: Caller) -> None:
    answer = admin.post("/admin/tenants", content=b'{"name": "a"}', headers={"Content-Type": "text/plain"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_body")
    assert "application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "content", "status", "code"),
    [
        ({"Content-Encoding": "gzip"}, b"{}", 415, "unsupported_encoding"),
        ({"Content-Encoding": "{x}"}, b"{}", 415, "unsupported_encoding"),
        ({"Idempotency-Key": "1"}, b'{"name": "a"}', 422, "not_supported_yet"),
        ({}, b" " * (JSON_BODY_BYTES + 1), 413, "body_too_large"),
    ],
)
def test_what_a_request_may_not_be_is_refused(
    headers: dict[str, str], content: bytes, status: int, code: str, admin: Caller
) -> None:
    headers = {"Content-Type": "application/json", **headers}
    answer = admin.post("/admin/tenants", content=content, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert admin.get("/admin/tenants").json()["data"] == []


def test_a_body_without_a_length_is_counted_as_it_comes(admin: Caller) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(JSON_BODY_BYTES // 2**16 + 1):
            yield b" " * 2**16

    answer = admin.post("/admin/tenants", content=chunks(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("get", "/nothing", 404, "unknown_route"),
        ("get", "/jobs/", 404, "unknown_route"),
        ("get", "/v1/models", 404, "unknown_route"),
        ("post", "/api/v1/create_session", 404, "unknown_route"),
        ("get", "/{path}", 404, "unknown_route"),
        ("delete", "/jobs", 405, "method_not_allowed"),
        ("get", "/me?verbose=1", 422, "unknown_parameter"),
        ("get", "/jobs?name=a%00b", 422, "invalid_request"),
        ("get", "/jobs?metadata[team]=%00", 422, "invalid_request"),
        ("get", "/jobs/job_%00", 404, "not_found"),
        ("delete", "/adapters/%00", 404, "not_found"),
    ],
)
def test_a_wrong_address_is_an_error_of_the_same_shape(
    method: str, path: str, status: int, code: str, alice: Caller
) -> None:
    answer = alice.request(method, path)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert set(error) == {"message", "type", "param", "code", "details", "request_id"}
    assert error["request_id"] == answer.headers["x-request-id"]
    if status == 405:
        assert answer.headers["allow"]


def test_a_mistake_of_ours_is_500_with_a_request_id_and_a_traceback_in_the_log(
    publish_base: Callable[..., Base], alice: Caller, services: Services, caplog: pytest.LogCaptureFixture
) -> None:
    base = publish_base(manifest=None)  # a row of an older version, which does not tell what is damaged
    services.store.path(f"{base.folder_key}/tokenizer.json").unlink()
    answer = alice.post("/generate", json={"model": "base", "prompt": "a canary sings"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (500, "internal_error", "server_error")
    assert error["request_id"] == answer.headers["x-request-id"]
    record = next(record for record in caplog.records if record.message == "internal_error")
    assert record.exc_info
    assert record.fields["request_id"] == error["request_id"]  # type: ignore[attr-defined]
    assert "canary" not in caplog.text


def test_each_request_is_one_line_of_the_log_without_keys_or_bodies(
    alice: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    caplog.clear()
    alice.post("/jobs", json={"dataset": "a canary sings"})
    lines = [record.fields for record in caplog.records if record.message == "request"]  # type: ignore[attr-defined]
    assert [(line["method"], line["path"], line["status"]) for line in lines] == [("POST", "/jobs", 503)]
    assert lines[0]["tenant_id"] == alice.tenant_id
    everything = " ".join(str(vars(record)) for record in caplog.records)
    assert "canary" not in everything
    assert str(alice.key) not in everything


def test_every_code_that_a_client_may_meet_is_a_word(routes: FastAPI) -> None:
    """Codes are for programs: lower case, no spaces, the same wherever the same thing is meant."""
    source = "\n".join(path.read_text() for path in Path(server.__file__ or "").parent.rglob("*.py"))
    codes = set(re.findall(r'MixloomError\(\s*"([^"]+)"', source))
    assert len(codes) > 20
    assert all(re.fullmatch(r"[a-z0-9_]+", code) for code in codes)


NO_TORCH = """
import json, sys, time
from pathlib import Path
from fastapi.testclient import TestClient
from server.api.app import create_app
from server.db.tables import Base, Daemon
from server.settings import Settings
from tests.server.conftest import TARGETS
from tests.tiny import write_tiny_tokenizer

app = create_app(Settings(data_dir=Path(sys.argv[1]), admin_key=sys.argv[2]))
services = app.state.services
services.store.put("bases/0", write_tiny_tokenizer)
with services.database.write() as session:
    session.add(Base(hash="0", name="tiny", path="", folder_key="bases/0", dtype="float32", context=256,
                     microbatch_tokens=128, parameters=1, num_layers=1, targets=TARGETS, fingerprint={}, probe={},
                     published_at=0.0))
    session.add(Daemon(pid=1, base_hash="0", state="ready", detail={}, floor=0.0, started_at=0.0,
                       heartbeat_at=time.time(), ended_at=None, expires_at=time.time() + 60))
with TestClient(app) as client:
    admin = {"Authorization": f"Bearer {sys.argv[2]}"}
    key = client.post("/admin/tenants", json={"name": "a"}, headers=admin).json()["key"]
    me = {"Authorization": f"Bearer {key}"}
    assert client.get("/base", headers=me).status_code == 200
    file = ("a.jsonl", json.dumps({"prompt": "a", "completion": "b"}))
    dataset = client.post("/datasets", files={"file": file}, headers=me).json()["id"]
    assert client.post("/jobs", json={"dataset": dataset}, headers=me).status_code == 201
loaded = {"torch", "transformers", "datasets", "engine", "scheduler"} & set(sys.modules)
assert not loaded, loaded
"""


def test_upload_and_submit_leave_the_api_process_without_torch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, str(tmp_path / "data"), ADMIN_KEY], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
