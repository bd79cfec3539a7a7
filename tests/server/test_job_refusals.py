"""What makes a job be refused, and what is only warned of."""

from collections.abc import Callable
from typing import Any

import pytest

from server.api.services import Services
from server.db.tables import Base
from tests.server.conftest import Caller
from tests.server.making import prompt_rows, submit, upload

pytestmark = pytest.mark.usefixtures("base")


@pytest.mark.parametrize(
    ("config", "status", "code", "param"),
    [
        ({"dataset": None}, 422, "invalid_request", "dataset"),
        ({"dataset": "ds_nothing"}, 404, "not_found", "dataset"),
        ({"validation": "ds_nothing"}, 404, "not_found", "validation"),
        ({"validation": 0.6}, 422, "invalid_request", "validation"),
        ({"base": "llama"}, 422, "unknown_base", "base"),
        ({"colour": "blue"}, 422, "unknown_field", "colour"),
        ({"adapter": {"r": 8}}, 422, "unknown_field", "adapter.r"),
        ({"training": {"warmup_steps": 8}}, 422, "unknown_field", "training.warmup_steps"),
        ({"adapter": {"rank": 0}}, 422, "invalid_request", "adapter.rank"),
        ({"adapter": {"rank": 8.5}}, 422, "invalid_request", "adapter.rank"),
        ({"adapter": {"rank": "8"}}, 422, "invalid_request", "adapter.rank"),
        ({"adapter": {"rank": True}}, 422, "invalid_request", "adapter.rank"),
        ({"adapter": {"rank": 10**30}}, 422, "rank_too_large", "adapter.rank"),
        ({"adapter": {"dropout": 1}}, 422, "invalid_request", "adapter.dropout"),
        ({"adapter": {"num_experts": 1}}, 422, "invalid_request", "adapter.num_experts"),
        ({"adapter": {"top_k": 9}}, 422, "top_k_too_large", "adapter.top_k"),
        ({"adapter": {"target_modules": ["nope"]}}, 422, "unknown_target", "adapter.target_modules"),
        ({"adapter": {"method": "vera"}}, 422, "invalid_request", "adapter.method"),
        ({"training": {"epochs": 1, "max_steps": 1}}, 422, "epochs_and_max_steps", "training.max_steps"),
        ({"training": {"batch_size": 13}}, 422, "batch_too_large", "training.batch_size"),
        ({"training": {"seed": 2**63}}, 422, "invalid_request", "training.seed"),
        ({"training": {"cutoff_length": 20}}, 422, "row_too_long", "dataset"),
        ({"training": {"cutoff_length": 129}}, 422, "cutoff_too_large", "training.cutoff_length"),
        ({"metadata": {"a key": "x"}}, 422, "invalid_request", "metadata.a key"),
        ({"metadata": {"key": 1}}, 422, "invalid_request", "metadata.key"),
        ({"metadata": {f"k{i}": "x" for i in range(17)}}, 422, "invalid_request", "metadata"),
    ],
)
def test_a_bad_config_is_refused_by_name_and_keeps_nothing(
    config: dict[str, Any], status: int, code: str, param: str, alice: Caller, services: Services
) -> None:
    answer = alice.post("/jobs", json={"dataset": upload(alice, prompt_rows(12)), **config})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert alice.get("/jobs").json()["data"] == []
    assert services.store.list("jobs") == []


def test_several_mistakes_are_all_listed(alice: Caller) -> None:
    body = {"dataset": "ds_1", "adapter": {"rank": 0, "r": 1}, "training": {"seed": -1}}
    details = alice.post("/jobs", json=body).json()["error"]["details"]
    assert {detail["column"] for detail in details} == {"adapter.rank", "adapter.r", "training.seed"}


def test_before_there_is_a_base_a_job_is_refused_as_too_early(alice: Caller, services: Services) -> None:
    dataset = upload(alice, prompt_rows(3))
    with services.database.write() as session:
        session.execute(Base.__table__.delete())
    answer = alice.post("/jobs", json={"dataset": dataset})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "base_not_ready")
    assert answer.headers["retry-after"]


def test_long_rows_are_named_by_line_and_can_be_skipped_or_truncated(alice: Caller) -> None:
    rows = prompt_rows(12)
    rows[4]["completion"] = "long " * 20
    dataset = upload(alice, rows)
    answer = alice.post("/jobs", json={"dataset": dataset, "training": {"cutoff_length": 70}})
    assert [detail["line"] for detail in answer.json()["error"]["details"]] == [5]
    for long_rows, words in (("skip", "left out"), ("truncate", "are cut")):
        job = submit(alice, dataset, training={"cutoff_length": 70, "long_rows": long_rows})
        events = alice.get(f"/jobs/{job['id']}/events").json()["data"]
        assert [words in event["message"] for event in events if event["kind"] == "warning"] == [True]


def test_a_single_expert_a_token_is_warned_of(alice: Caller) -> None:
    job = submit(alice, adapter={"top_k": 1})["id"]
    events = alice.get(f"/jobs/{job}/events", params={"order": "asc"}).json()["data"]
    assert [event["kind"] for event in events] == ["queued", "warning"]


def test_messages_on_a_base_without_a_template_are_refused(alice: Caller, publish_base: Callable[..., Base]) -> None:
    messages = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]
    dataset = upload(alice, [{"messages": messages}])
    publish_base(hash="89ab", template=False)
    answer = alice.post("/jobs", json={"dataset": dataset})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "no_chat_template")
