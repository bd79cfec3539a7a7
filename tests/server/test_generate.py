"""Asking a model over REST: what reaches the daemon, what comes back, and what is refused."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from server.api.services import Services
from server.db.tables import Base, Daemon, Operation
from tests.server.answering import answering, continue_with, fail_with
from tests.server.conftest import Caller
from tests.server.making import add_adapter, submit
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False).ids)


@pytest.mark.usefixtures("base")
def test_an_answer_has_text_tokens_and_usage(alice: Caller, services: Services) -> None:
    with answering(services, continue_with(ids("Hello!"))) as seen:
        answer = alice.post("/generate", json={"model": "base", "prompt": "Hi"})
    shown = answer.json()
    assert (answer.status_code, shown["object"], shown["model"]) == (200, "generation", "base")
    assert (shown["text"], shown["tokens"], shown["finish_reason"]) == ("Hello!", ids("Hello!"), "stop")
    assert (shown["logprobs"], shown["prompt_logprobs"]) == (None, None)
    assert shown["prompt_tokens"] == seen[0]["tokens"]
    assert shown["usage"] == {
        "prompt_tokens": len(shown["prompt_tokens"]),
        "completion_tokens": len(ids("Hello!")),
    }


@pytest.mark.usefixtures("base")
def test_what_is_asked_for_reaches_the_daemon(alice: Caller, services: Services) -> None:
    asked = {"max_tokens": 7, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 11, "logprobs": True}
    with answering(services, continue_with(ids("Yes"))) as seen:
        alice.post("/generate", json={"model": "base", "prompt": [5, 6, 7], **asked})
        alice.post("/generate", json={"model": "base", "prompt": [5, 6, 7]})
        alice.post("/generate", json={"model": "base", "prompt": [5, 6, 7]})
    assert {name: seen[0][name] for name in asked} == asked
    assert seen[0]["tokens"] == [5, 6, 7]
    assert seen[0]["stop_tokens"] == ids("<|im_end|>")
    usual = {name: seen[1][name] for name in asked if name != "seed"}
    assert usual == {"max_tokens": 253, "temperature": 0.0, "top_k": None, "top_p": None, "logprobs": False}
    assert seen[1]["seed"] != seen[2]["seed"]


@pytest.mark.usefixtures("base")
def test_a_prompt_is_rendered_as_a_training_row_unless_raw(alice: Caller, services: Services) -> None:
    with answering(services, continue_with([])) as seen:
        alice.post("/generate", json={"model": "base", "prompt": "Hi"})
        alice.post("/generate", json={"model": "base", "messages": [{"role": "user", "content": "Hi"}]})
        alice.post("/generate", json={"model": "base", "prompt": "Hi", "raw": True})
    assert seen[0]["tokens"] == seen[1]["tokens"]
    assert TOKENIZER.decode(seen[0]["tokens"], skip_special_tokens=False).endswith(
        "Hi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert seen[2]["tokens"] == ids("Hi")


@pytest.mark.usefixtures("base")
def test_no_tokens_with_logprobs_scores_the_prompt(alice: Caller, services: Services) -> None:
    with answering(services, continue_with(ids("never"), "length")):
        body = {"model": "base", "prompt": [5, 6, 7], "max_tokens": 0, "logprobs": True}
        answer = alice.post("/generate", json=body).json()
    assert answer["prompt_logprobs"] == [None, -1.0, -1.0]
    assert (answer["text"], answer["tokens"], answer["logprobs"], answer["finish_reason"]) == ("", [], [], "length")


@pytest.mark.usefixtures("base")
@pytest.mark.parametrize(
    ("stop", "text"),
    [("cd", "ab"), (["zz", "d"], "abc"), (["e", "b"], "a"), ("a", ""), ("zz", "abcdef"), (["f"], "abcde")],
)
def test_an_answer_ends_before_the_first_stop_text(stop: Any, text: str, alice: Caller, services: Services) -> None:
    with answering(services, continue_with(ids("abcdef"), "length")):
        body = {"model": "base", "prompt": "Hi", "stop": stop, "logprobs": True}
        answer = alice.post("/generate", json=body).json()
    assert answer["text"] == TOKENIZER.decode(answer["tokens"]) == text
    assert len(answer["logprobs"]) == answer["usage"]["completion_tokens"] == len(text)
    assert answer["finish_reason"] == ("length" if text == "abcdef" else "stop")


@pytest.mark.usefixtures("base")
def test_a_model_is_an_adapter_or_the_newest_of_a_job(alice: Caller, services: Services) -> None:
    job = submit(alice)["id"]
    early = alice.post("/generate", json={"model": job, "prompt": "Hi"})
    assert (early.status_code, early.json()["error"]["code"]) == (409, "no_adapter_yet")
    adapters = [add_adapter(services, job, step) for step in (1, 2)]
    asked: list[str | None] = []

    def answer(request: dict[str, Any]) -> list[dict[str, Any]]:
        with services.database.read() as session:
            asked.append(session.query(Operation).one().adapter_id)
        return [{"finish_reason": "stop"}]

    with answering(services, answer):
        for model in (adapters[0], job, "base"):
            assert alice.post("/generate", json={"model": model, "prompt": "Hi"}).json()["model"] == model
    assert asked == [adapters[0], adapters[1], None]


@pytest.mark.usefixtures("base")
@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({}, 422, "invalid_prompt", "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, 422, "invalid_prompt", "prompt"),
        ({"prompt": []}, 422, "invalid_prompt", "prompt"),
        ({"prompt": [10**6]}, 422, "invalid_prompt", "prompt"),
        ({"prompt": [True]}, 422, "invalid_request", "prompt"),
        ({"prompt": 5}, 422, "invalid_request", "prompt"),
        ({"prompt": [5] * 257}, 422, "prompt_too_long", "prompt"),
        ({"prompt": [5] * 256}, 422, "prompt_too_long", "prompt"),
        ({"messages": [{"role": "user", "content": "a" * 300}]}, 422, "prompt_too_long", "messages"),
        ({"prompt": [5] * 200, "max_tokens": 57}, 422, "max_tokens_too_large", "max_tokens"),
        ({"prompt": "a", "max_tokens": 0}, 422, "nothing_asked", "logprobs"),
        ({"prompt": "a", "stream": True}, 422, "not_supported_yet", "stream"),
        ({"prompt": "a", "temperature": -1}, 422, "invalid_request", "temperature"),
        ({"prompt": "a", "top_p": 0}, 422, "invalid_request", "top_p"),
        ({"prompt": "a", "top_k": 0}, 422, "invalid_request", "top_k"),
        ({"prompt": "a", "stop": [""]}, 422, "invalid_request", "stop"),
        ({"prompt": "a", "stop": ["x"] * 5}, 422, "invalid_request", "stop"),
        ({"prompt": "a", "n": 2}, 422, "unknown_field", "n"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 422, "invalid_request", "messages.0.role"),
        ({"prompt": "a", "model": "adp_nothing"}, 404, "not_found", "model"),
        ({"prompt": "a", "model": "job_nothing"}, 404, "not_found", "model"),
        ({"prompt": "a", "model": "gpt"}, 404, "not_found", "model"),
    ],
)
def test_a_bad_request_is_refused_by_name(
    body: dict[str, Any], status: int, code: str, param: str, alice: Caller, services: Services
) -> None:
    answer = alice.post("/generate", json={"model": "base", **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert services.store.list("operations") == []


def test_an_adapter_of_another_base_is_not_asked(
    alice: Caller, services: Services, publish_base: Callable[..., Base]
) -> None:
    publish_base()
    adapter = add_adapter(services, submit(alice)["id"], 1)
    publish_base(hash="4567")
    answer = alice.post("/generate", json={"model": adapter, "prompt": "Hi"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "adapter_of_other_base")


def test_without_a_live_daemon_nothing_is_generated(
    alice: Caller, services: Services, publish_base: Callable[..., Base]
) -> None:
    publish_base(live=False)
    answer = alice.post("/generate", json={"model": "base", "prompt": "Hi"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_daemon")
    assert answer.headers["retry-after"]


@pytest.mark.usefixtures("base")
def test_a_daemon_that_dies_meanwhile_is_noticed(alice: Caller, services: Services) -> None:
    def die(request: dict[str, Any]) -> list[dict[str, Any]]:
        with services.database.write() as session:
            session.query(Daemon).update({"ended_at": time.time()})
        time.sleep(1)
        return []

    with answering(services, die):
        answer = alice.post("/generate", json={"model": "base", "prompt": "Hi"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_daemon")


@pytest.mark.usefixtures("base")
@pytest.mark.parametrize(("category", "status"), [("user", 422), ("server", 500)])
def test_the_daemons_error_is_the_answers(category: str, status: int, alice: Caller, services: Services) -> None:
    with answering(services, fail_with(category, "out_of_luck")):
        answer = alice.post("/generate", json={"model": "base", "prompt": "Hi"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["message"]) == (status, "out_of_luck", "It cannot.")


@pytest.mark.usefixtures("base")
def test_an_answer_that_found_no_room_is_507(alice: Caller, services: Services) -> None:
    with answering(services, fail_with("server", "disk_full")):
        answer = alice.post("/generate", json={"model": "base", "prompt": "Hi"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "disk_full")
    assert "MiB are free" in answer.json()["error"]["message"]
    assert int(answer.headers["Retry-After"]) > 0
    assert services.store.list("operations") == []


@pytest.mark.usefixtures("base")
def test_nothing_of_a_request_is_left_when_it_was_answered(alice: Caller, services: Services) -> None:
    with answering(services, continue_with(ids("Hello!"))):
        alice.post("/generate", json={"model": "base", "prompt": "Hi"})
    assert services.store.list("operations") == []
    with services.database.read() as session:
        assert session.query(Operation).count() == 0


@pytest.mark.usefixtures("base")
def test_a_hundred_requests_wait_at_once(alice: Caller, services: Services) -> None:
    together: list[int] = []

    def answer_when_all_are_there(request: dict[str, Any]) -> list[dict[str, Any]]:
        until = time.monotonic() + 20
        while not together and time.monotonic() < until:
            with services.database.read() as session:
                if session.query(Operation).count() == 100:
                    together.append(100)
            time.sleep(0.02)
        return [{"tokens": ids("Hello!"), "logprobs": []}, {"finish_reason": "stop"}]

    def ask(number: int) -> str:
        return str(alice.post("/generate", json={"model": "base", "prompt": f"Hi {number}"}).json()["text"])

    with answering(services, answer_when_all_are_there), ThreadPoolExecutor(100) as pool:
        assert list(pool.map(ask, range(100))) == ["Hello!"] * 100
    assert together == [100]
