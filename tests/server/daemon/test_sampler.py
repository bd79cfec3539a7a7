"""Requests that are sampled together: what one may do to another (nothing), and where they end."""

import json
from pathlib import Path
from typing import Any

import pytest

from server.api.services import Services
from server.daemon.prices import prices_of
from server.daemon.sampler import SLICE_TOKENS
from server.db import operations
from server.db.tables import Base, Operation
from server.faults import Fault, arm
from server.ids import new_id
from tests.server.conftest import Caller
from tests.server.daemon.conftest import PLAIN, Life, counter, submit
from tests.server.making import uploadable_adapter
from tests.server.test_uploads import LORA, send

PROMPT = list(range(20, 40))


@pytest.fixture
def ask(life: Life, alice: Caller, services: Services) -> Any:
    """Puts an operation before the daemon as the API does: `ask([1, 2], max_tokens=4)`; its id."""

    def put(tokens: list[int], *, max_tokens: int = 40, logprobs: bool = False, adapter: str | None = None) -> str:
        id_ = new_id("gen")
        request = {
            "tokens": tokens,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "top_k": None,
            "top_p": None,
            "seed": 1,
            "stop_tokens": [],
            "logprobs": logprobs,
        }
        key = f"operations/{id_}"
        services.store.put(key, lambda folder: write(folder, request))
        with services.database.write() as session:
            operations.add_sample(
                session,
                id_=id_,
                tenant_id=alice.tenant_id,
                adapter_id=adapter,
                base_hash=session.query(Base).one().hash,
                key=key,
                deadline=2e9,
            )
        return id_

    return put


def write(folder: Path, request: dict[str, Any]) -> None:
    (folder / "request.json").write_text(json.dumps(request))


def operation(services: Services, id_: str) -> Operation:
    with services.database.read() as session:
        return session.get_one(Operation, id_)


def result(services: Services, id_: str) -> tuple[list[int], str | None]:
    """(tokens, how it ended) of a result file."""
    file = operations.result_file(operation(services, id_))
    lines = (services.store.path(f"operations/{id_}") / file).read_text().splitlines()
    parts = [json.loads(line) for line in lines]
    return [token for part in parts for token in part.get("tokens", [])], parts[-1].get("finish_reason")


def finish(life: Life, *ids: str) -> None:
    life.turn_until(lambda: all(operation(life.services, id_).finished_at for id_ in ids))


@pytest.mark.parametrize("logprobs", [False, True], ids=["when it is sampled", "when its prompt is scored"])
def test_a_request_that_breaks_the_pass_fails_alone(logprobs: bool, life: Life, ask: Any, services: Services) -> None:
    alone = ask(PROMPT)
    finish(life, alone)
    good, bad, other = ask(PROMPT), ask([10**6, 5], logprobs=logprobs), ask(PROMPT[::-1])
    finish(life, good, bad, other)
    assert [operation(services, id_).status for id_ in (good, bad, other)] == ["done", "failed", "done"]
    assert operation(services, bad).error["code"] == "generation_failed"
    assert result(services, good) == result(services, alone)
    assert len(result(services, good)[0]) == 40


@pytest.mark.parametrize(("kind", "code"), [("ENOSPC", "disk_full"), ("EIO", "answer_not_written")])
@pytest.mark.parametrize("after", [0, 1, 2], ids=["the prompt's score", "the first tokens", "the end"])
def test_an_answer_that_the_disk_does_not_take_fails_alone(
    after: int, kind: Any, code: str, life: Life, ask: Any, services: Services, armed: Path
) -> None:
    arm(armed, Fault(point="answer.append", kind=kind, after=after))
    bad = ask(PROMPT, max_tokens=SLICE_TOKENS, logprobs=True)
    life.turn(2)
    good = ask(PROMPT)
    finish(life, bad, good)
    assert (operation(services, bad).status, operation(services, bad).error["code"]) == ("failed", code)
    assert operation(services, good).status == "done"


def test_what_was_under_way_when_a_daemon_died_is_done_by_the_next_one(
    life: Life, ask: Any, new_life: Any, services: Services
) -> None:
    alone = ask(PROMPT)
    finish(life, alone)
    id_ = ask(PROMPT)
    life.loop.turn()
    assert operation(services, id_).status == "running"
    assert len(result(services, id_)[0]) == SLICE_TOKENS
    finish(new_life(), id_)
    assert result(services, id_) == result(services, alone)


def test_a_request_that_nobody_waits_for_any_more_is_let_go(life: Life, ask: Any, services: Services) -> None:
    id_ = ask(PROMPT, max_tokens=200)
    life.turn()
    with services.database.write() as session:
        operations.give_up(session, id_, {"code": "generation_timed_out"})
    services.store.delete(f"operations/{id_}")
    after = ask(PROMPT)
    finish(life, after)
    assert operation(services, id_).status == "failed"
    assert operation(services, after).status == "done"


def test_what_is_sampled_while_others_train_is_paid_and_in_an_idle_server_it_is_free(
    ask: Any, life: Life, alice: Caller, bob: Caller, services: Services
) -> None:
    def paid() -> float:
        return counter(services, alice).counter

    idle = ask(PROMPT)
    life.turn_until(lambda: operation(services, idle).status == "done")
    assert paid() == 0
    submit(bob, PLAIN, steps=40)
    life.turn_until(lambda: bool(life.loop.residents))
    life.turn(2)
    floor = life.loop.recorder.floor
    ask(PROMPT, max_tokens=SLICE_TOKENS)
    life.turn_until(lambda: paid() > 0)
    prices = prices_of(life.loop.engine.base, None)
    due = prices.forward(len(PROMPT)) + prices.sample(SLICE_TOKENS, num_sequences=1)
    assert paid() >= floor + due > floor


def test_an_uploaded_adapter_is_asked_like_any_other_and_one_that_is_deleted_meanwhile_is_not(
    life: Life, ask: Any, alice: Caller, services: Services
) -> None:
    with services.database.read() as session:
        base = session.query(Base).one()
    ids = [send(alice, *uploadable_adapter({**LORA, "alpha": alpha}, base)).json()["id"] for alpha in (8, 9)]
    plain, adapted, gone = ask(PROMPT), ask(PROMPT, adapter=ids[0]), ask(PROMPT, adapter=ids[1])
    alice.delete(f"/adapters/{ids[1]}")
    finish(life, plain, adapted, gone)
    assert [operation(services, id_).status for id_ in (plain, adapted, gone)] == ["done", "done", "failed"]
    assert result(services, plain) != result(services, adapted)
    assert operation(services, gone).error["code"] == "adapter_unreadable"


def test_prompts_and_answers_are_metered(life: Life, ask: Any, alice: Caller, services: Services) -> None:
    ids = [ask(PROMPT, max_tokens=5), ask(PROMPT[:7], max_tokens=3)]
    life.turn_until(lambda: all(operation(services, id_).status == operations.DONE for id_ in ids))
    usage = alice.get("/usage").json()
    num_sampled = sum(len(result(services, id_)[0]) for id_ in ids)
    assert (usage["prompt_tokens"], usage["sampled_tokens"], usage["trained_tokens"]) == (27, num_sampled, 0)
