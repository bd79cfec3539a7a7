"""A request for a job that is sent again makes no second one."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from httpx import Response
from sqlalchemy import update

from server.api.services import Services
from server.db.tables import IdempotencyKey
from tests.server.conftest import Caller
from tests.server.making import prompt_rows, upload

pytestmark = pytest.mark.usefixtures("base")


def send(caller: Caller, dataset: str, *, key: str = "mine", **fields: Any) -> Response:
    return caller.post("/jobs", json={"dataset": dataset, **fields}, headers={"Idempotency-Key": key})


def count(caller: Caller) -> int:
    return len(caller.get("/jobs").json()["data"])


def test_the_same_request_makes_one_job_even_when_its_data_set_is_gone(alice: Caller) -> None:
    dataset = upload(alice, prompt_rows(10))
    first = send(alice, dataset, name="sums", priority="low")
    alice.delete(f"/datasets/{dataset}")
    again = alice.post(
        "/jobs",
        content=f'{{"priority": "low",  "name": "sums", "dataset": "{dataset}"}}',
        headers={"Idempotency-Key": "mine", "Content-Type": "application/json"},
    )
    assert (again.status_code, again.headers["location"]) == (201, first.headers["location"])
    assert again.json()["id"] == first.json()["id"]
    assert count(alice) == 1


def test_another_request_with_the_same_key_is_refused_and_another_key_is_another_job(alice: Caller) -> None:
    dataset = upload(alice, prompt_rows(10))
    send(alice, dataset)
    refused = send(alice, dataset, name="other")
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (422, "idempotency_key_reused", "Idempotency-Key")
    assert send(alice, dataset, key="another", name="other").status_code == 201
    assert count(alice) == 2


def test_a_key_is_its_tenants(alice: Caller, bob: Caller) -> None:
    ids = [send(caller, upload(caller, prompt_rows(10))).json()["id"] for caller in (alice, bob)]
    assert ids[0] != ids[1]
    assert [count(caller) for caller in (alice, bob)] == [1, 1]


def test_who_sends_it_many_times_at_once_has_one_job(alice: Caller, services: Services) -> None:
    dataset = upload(alice, prompt_rows(10))
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: send(alice, dataset), range(4)))
    assert [answer.status_code for answer in answers] == [201] * 4
    (id_,) = {answer.json()["id"] for answer in answers}
    assert [path.name for path in services.store.path("jobs").iterdir()] == [id_]
    assert count(alice) == 1


def test_what_was_refused_may_be_sent_again_with_its_key(alice: Caller) -> None:
    assert send(alice, "ds_gone").status_code == 404
    assert send(alice, upload(alice, prompt_rows(10))).status_code == 201


def test_a_key_is_kept_for_a_day(alice: Caller, services: Services) -> None:
    dataset = upload(alice, prompt_rows(10))
    first = send(alice, dataset).json()["id"]
    with services.database.write() as session:
        session.execute(update(IdempotencyKey).values(created_at=time.time() - 86400 - 1))
    assert send(alice, dataset).json()["id"] != first
    assert count(alice) == 2


def test_a_job_that_was_deleted_is_not_made_anew(alice: Caller) -> None:
    dataset = upload(alice, prompt_rows(10))
    job = send(alice, dataset).json()["id"]
    alice.post(f"/jobs/{job}/cancel")
    alice.delete(f"/jobs/{job}")
    assert send(alice, dataset).status_code == 404
    assert count(alice) == 0


def test_on_a_disk_without_room_the_job_that_was_made_is_answered_and_no_other_is_made(
    alice: Caller, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = upload(alice, prompt_rows(10))
    first = send(alice, dataset).json()["id"]
    monkeypatch.setattr(services.disk, "min_free_bytes", 2**62)
    again = send(alice, dataset)
    assert (again.status_code, again.json().get("id")) == (201, first)
    refused = send(alice, dataset, key="another")
    assert (refused.status_code, refused.json()["error"]["code"]) == (507, "disk_full")
    assert count(alice) == 1


@pytest.mark.parametrize("key", ["", "k" * 256])
def test_a_key_that_is_none_is_refused(key: str, alice: Caller) -> None:
    refused = send(alice, upload(alice, prompt_rows(10)), key=key)
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "invalid_request")
