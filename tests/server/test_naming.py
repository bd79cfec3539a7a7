"""Whose row could not be written has no files either; whose row may be there keeps them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.api.services import Services
from server.db.tables import Base
from server.store import LocalStore
from tests.server.conftest import Caller
from tests.server.daemon.test_commits import breaking
from tests.server.making import prompt_rows, upload, uploadable_adapter
from tests.server.test_uploads import LORA, send

FOLDERS = ("datasets", "jobs", "uploads", "operations")


@pytest.fixture
def requests(alice: Caller, base: Base) -> dict[str, Callable[[], Any]]:
    """By the folder that each adds to."""
    data = upload(alice, prompt_rows(12))
    return {
        "datasets": lambda: alice.post("/datasets", files={"file": ("rows.jsonl", json.dumps(prompt_rows(1)[0]))}),
        "jobs": lambda: alice.post("/jobs", json={"dataset": data}),
        "uploads": lambda: send(alice, *uploadable_adapter(LORA, base)),
        "operations": lambda: alice.post("/generate", json={"model": "base", "prompt": "What is 003?"}),
    }


def kept(services: Services) -> dict[str, set[str]]:
    return {name: set(services.store.list(name)) for name in FOLDERS}


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_no_row_names_is_gone_at_once_and_what_one_may_name_stays(
    folder: str, requests: dict[str, Callable[[], Any]], services: Services
) -> None:
    before = kept(services)
    with breaking("before_commit", after=0):
        assert requests[folder]().status_code == 503
    assert kept(services) == before
    with breaking("after_commit", after=0, in_doubt=True):
        assert requests[folder]().status_code == 503
    assert [len(kept(services)[name] - before[name]) for name in FOLDERS] == [name == folder for name in FOLDERS]


@pytest.mark.parametrize("folder", FOLDERS)
def test_whose_tenant_is_deleted_meanwhile_is_refused_and_leaves_nothing(
    folder: str,
    alice: Caller,
    admin: Caller,
    requests: dict[str, Callable[[], Any]],
    services: Services,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put = LocalStore.put

    def put_and_delete(self: LocalStore, key: str, write: Callable[[Path], None]) -> Path:
        path = put(self, key, write)
        assert admin.delete(f"/admin/tenants/{alice.tenant_id}").status_code == 200
        return path

    before = kept(services)
    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "put", put_and_delete)
        answer = requests[folder]()
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert kept(services) == before
