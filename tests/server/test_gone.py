"""Files that are not there: deleted while a request was about to read them, or lost."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from server.api.services import Services
from server.db.tables import Base
from server.store import LocalStore
from tests.server.conftest import Caller
from tests.server.making import add_adapter, prompt_rows, submit, upload, uploadable_adapter
from tests.server.test_uploads import LORA, send

Request = tuple[str, str, dict[str, Any] | None]
OF_DATASET: dict[str, Request] = {
    "rows": ("GET", "/datasets/{id}/rows", None),
    "content": ("GET", "/datasets/{id}/content", None),
    "job": ("POST", "/jobs", {"dataset": "{id}"}),
    "mixture": ("POST", "/jobs", {"dataset": [{"id": "{other}"}, {"id": "{id}"}]}),
    "validation": ("POST", "/jobs", {"dataset": "{other}", "validation": "{id}"}),
    "estimate": ("POST", "/jobs/estimate", {"dataset": "{id}"}),
}
OF_ADAPTER: dict[str, Request] = {
    "files": ("GET", "/adapters/{id}/files", None),
    "file": ("GET", "/adapters/{id}/files/adapter_config.json", None),
    "archive": ("GET", "/adapters/{id}/archive", None),
}


def ask(caller: Caller, request: Request, **ids: str) -> tuple[int, str, str]:
    """Status, code and message of the answer."""

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: filled(one) for name, one in value.items()}
        return [filled(one) for one in value] if isinstance(value, list) else value.format(**ids)

    method, path, body = request
    answer = caller.request(method, filled(path), json=None if body is None else filled(body))
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["message"]


@contextmanager
def deleting(caller: Caller, noun: str, id_: str) -> Iterator[None]:
    """Its tenant deletes it in the moment before its files are looked for."""
    path, done = LocalStore.path, []

    def path_late(self: LocalStore, key: str) -> Path:
        if id_ in key and not done:
            done.append(key)
            assert caller.delete(f"/{noun}/{id_}").status_code == 200
        return path(self, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, "path", path_late)
        yield
    assert done


@pytest.mark.usefixtures("base")
@pytest.mark.parametrize("request_", OF_DATASET.values(), ids=OF_DATASET)
def test_a_data_set_that_is_deleted_meanwhile_is_404_and_one_whose_files_are_lost_is_said(
    request_: Request, alice: Caller, services: Services
) -> None:
    other, lost, deleted = (upload(alice, prompt_rows(12)) for _ in range(3))
    with deleting(alice, "datasets", deleted):
        status, code, message = ask(alice, request_, id=deleted, other=other)
    assert (status, code) == (404, "not_found")
    assert deleted in message
    services.store.delete(f"datasets/{lost}")
    assert ask(alice, request_, id=lost, other=other)[:2] == (500, "file_missing")
    assert alice.get("/jobs").json()["data"] == []


@pytest.mark.parametrize("request_", OF_ADAPTER.values(), ids=OF_ADAPTER)
def test_an_adapter_that_is_deleted_meanwhile_is_404_and_one_whose_files_are_lost_is_said(
    request_: Request, alice: Caller, base: Base, services: Services
) -> None:
    lost, deleted = add_adapter(services, submit(alice)["id"], 1), add_adapter(services, submit(alice)["id"], 1)
    uploaded = send(alice, *uploadable_adapter(LORA, base)).json()["id"]
    for id_ in (deleted, uploaded):
        with deleting(alice, "adapters", id_):
            status, code, message = ask(alice, request_, id=id_)
        assert (status, code) == (404, "not_found")
        assert id_ in message
    services.store.delete(f"adapters/{lost}")
    assert ask(alice, request_, id=lost)[:2] == (500, "file_missing")


@pytest.mark.usefixtures("base")
@pytest.mark.databases("sqlite")
def test_an_adapter_that_is_deleted_in_its_export_is_404(
    alice: Caller, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, run = add_adapter(services, submit(alice)["id"], 1), subprocess.run

    def run_late(*arguments: Any, **options: Any) -> Any:
        assert alice.delete(f"/adapters/{adapter}").status_code == 200
        return run(*arguments, **options)

    monkeypatch.setattr(subprocess, "run", run_late)
    answer = alice.get(f"/adapters/{adapter}/archive", params={"format": "mixlora"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
