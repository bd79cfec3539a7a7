"""A daemon's side of `/generate`, without an engine: it follows the same rows and files."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import select, update

from server.api.services import Services
from server.db.operations import result_file
from server.db.tables import Daemon, Operation

Request = dict[str, Any]
Line = dict[str, Any]


def continue_with(tokens: list[int], finish_reason: str = "stop") -> Callable[[Request], list[Line]]:
    """What a model would write: always the same tokens, one a line, each of log-probability -0.5."""

    def answer(request: Request) -> list[Line]:
        lines: list[Line] = []
        if request["logprobs"]:
            lines.append({"prompt_logprobs": [None] + [-1.0] * (len(request["tokens"]) - 1)})
        lines += [{"tokens": [token], "logprobs": [-0.5]} for token in tokens[: request["max_tokens"]]]
        return [*lines, {"finish_reason": finish_reason}]

    return answer


def fail_with(category: str, code: str) -> Callable[[Request], list[Line]]:
    """A model that cannot."""

    def answer(request: Request) -> list[Line]:
        raise RuntimeError(json.dumps({"category": category, "code": code, "message": "It cannot."}))

    return answer


@contextmanager
def answering(services: Services, answer: Callable[[Request], list[Line]]) -> Iterator[list[Request]]:
    """Answer every operation while the block runs; the requests seen so far."""
    seen: list[Request] = []
    stop = threading.Event()
    thread = threading.Thread(target=_serve, args=(services, answer, seen, stop))
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def _serve(
    services: Services, answer: Callable[[Request], list[Line]], seen: list[Request], stop: threading.Event
) -> None:
    while not stop.is_set():
        with services.database.write() as session:
            session.execute(update(Daemon).where(Daemon.ended_at.is_(None)).values(expires_at=time.time() + 15))
            pending = list(session.scalars(select(Operation).where(Operation.status == "pending")))
        for operation in pending:
            folder = services.store.path(operation.key)
            seen.append(json.loads((folder / "request.json").read_text()))
            values: dict[str, Any] = {"status": "done"}
            try:
                written = "".join(json.dumps(line) + "\n" for line in answer(seen[-1]))
            except RuntimeError as error:
                values = {"status": "failed", "error": json.loads(str(error))}
                written = '{"tokens": [5], "logpr'  # a full disk cuts a line anywhere
            (folder / result_file(operation)).write_text(written)
            with services.database.write() as session:
                session.execute(update(Operation).where(Operation.id == operation.id).values(**values))
        stop.wait(0.01)
