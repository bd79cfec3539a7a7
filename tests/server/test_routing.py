"""Which thread does what of a request."""

import asyncio
import threading
from collections.abc import Iterator

import anyio
import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import event
from starlette.types import Message

from server.api.routing import new_router
from server.api.services import Services
from server.db.tables import Base
from tests.server.conftest import Caller
from tests.server.making import submit


@pytest.fixture
def threads(services: Services) -> Iterator[list[int]]:
    """Those that ran a statement."""
    seen: list[int] = []

    def see(*_: object) -> None:
        seen.append(threading.get_ident())

    event.listen(services.database.engine, "before_cursor_execute", see)
    yield seen
    event.remove(services.database.engine, "before_cursor_execute", see)


def test_one_thread_looks_up_the_caller_and_answers(alice: Caller, base: Base, threads: list[int]) -> None:
    job = submit(alice)["id"]
    loop = alice.portal.call(threading.get_ident)  # type: ignore[union-attr]
    threads.clear()
    assert alice.get(f"/jobs/{job}").status_code == 200
    assert len(threads) > 1
    assert len(set(threads)) == 1
    assert loop not in threads


def test_no_statement_of_a_route_that_waits_is_run_in_the_event_loop(
    alice: Caller, base: Base, threads: list[int]
) -> None:
    loop = alice.portal.call(threading.get_ident)  # type: ignore[union-attr]
    assert alice.post("/datasets", files={"file": ("a.jsonl", '{"text": "a"}')}).status_code == 201
    assert threads
    assert loop not in threads


def test_a_body_that_breaks_off_is_no_mistake_of_the_server(
    app: FastAPI, alice: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    headers = [(b"authorization", f"Bearer {alice.key}".encode()), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/jobs", "headers": headers, "query_string": b""}
    messages = iter([{"type": "http.request", "body": b'{"data', "more_body": True}, {"type": "http.disconnect"}])
    sent: list[Message] = []

    async def receive() -> Message:
        return next(messages)

    async def send(message: Message) -> None:
        sent.append(message)

    async def call() -> None:
        await app(scope, receive, send)

    anyio.run(call)
    assert sent[0]["status"] == 400
    assert "internal_error" not in caplog.text


def test_a_route_that_is_not_async_may_depend_on_nothing_that_waits() -> None:
    async def wait() -> None:
        await asyncio.sleep(0)

    router = new_router(tag="tests")

    @router.get("/late", dependencies=[Depends(wait)])
    def late() -> dict[str, str]:
        return {}

    app = FastAPI()
    app.include_router(router)
    with pytest.raises(AssertionError, match="waits for something"):
        TestClient(app).get("/late")
