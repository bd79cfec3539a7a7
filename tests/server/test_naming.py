"""Whose row could not be written has no files either; whose row may be there keeps them."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from server.api.services import Services
from server.db.tables import Base
from tests.server.conftest import Caller
from tests.server.daemon.test_commits import breaking
from tests.server.making import prompt_rows, upload, uploadable_adapter
from tests.server.test_uploads import LORA, send

FOLDERS = ("datasets", "jobs", "uploads", "operations")


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_no_row_names_is_gone_at_once_and_what_one_may_name_stays(
    folder: str, alice: Caller, base: Base, services: Services
) -> None:
    data = upload(alice, prompt_rows(12))
    requests: dict[str, Callable[[], Any]] = {
        "datasets": lambda: alice.post("/datasets", files={"file": ("rows.jsonl", json.dumps(prompt_rows(1)[0]))}),
        "jobs": lambda: alice.post("/jobs", json={"dataset": data}),
        "uploads": lambda: send(alice, *uploadable_adapter(LORA, base)),
        "operations": lambda: alice.post("/generate", json={"model": "base", "prompt": "What is 003?"}),
    }

    def kept() -> dict[str, set[str]]:
        return {name: set(services.store.list(name)) for name in FOLDERS}

    before = kept()
    with breaking("before_commit", after=0):
        assert requests[folder]().status_code == 503
    assert kept() == before
    with breaking("after_commit", after=0, in_doubt=True):
        assert requests[folder]().status_code == 503
    assert [len(kept()[name] - before[name]) for name in FOLDERS] == [name == folder for name in FOLDERS]
