"""Routes that read JSON strictly, refuse what they do not know, and block one thread each. Every router is made here.

FastAPI hands each function that is not `async` to a thread, and its answer to another one to be serialised: three
changes of threads for a route that looks up its caller. Here such a route is handled in one thread as a whole.
"""

import asyncio
import json
from collections.abc import Callable, Coroutine
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any, ParamSpec, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from server import strict_json
from server.errors import MixloomError, not_supported_yet


class _StrictRequest(Request):
    async def json(self) -> Any:
        """The body's value. Raises what FastAPI knows as "not JSON", the reason in its message."""
        try:
            value = strict_json.parse((await self.body()).decode())
            if flaw := strict_json.flaw(value):
                raise ValueError(flaw)
            return value
        except UnicodeDecodeError:
            raise json.JSONDecodeError("is not UTF-8", "", 0) from None
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from None


P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What a function that may block returns; the event loop goes on, unless this is already another thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return function(*args, **kwargs)
    return await run_in_threadpool(function, *args, **kwargs)


class _Blocking:
    """A function that may block as one that FastAPI leaves where it is."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        wraps(function)(self)

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _finished(handling: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns that waits for nothing."""
    try:
        handling.send(None)
    except StopIteration as end:
        value: T = end.value
        return value
    raise AssertionError("a route that is not async waits for something that is")


class _Route(APIRoute):
    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any):
        is_ours = iscoroutinefunction(endpoint) or isinstance(endpoint, _Blocking)
        super().__init__(path, endpoint if is_ours else _Blocking(endpoint), **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            _refuse_unknown(request)
            return await handle(_StrictRequest(request.scope, request.receive))

        async def handle_in_thread(request: Request) -> Response:
            strict = _StrictRequest(request.scope, request.receive)
            if self.body_field:
                try:
                    await strict.body()
                except ClientDisconnect:
                    raise HTTPException(400) from None
            _refuse_unknown(request)
            return await run_in_threadpool(lambda: _finished(handle(strict)))

        return handle_in_thread if isinstance(self.endpoint, _Blocking) else handle_strictly


def new_router(*, prefix: str = "", tag: str) -> APIRouter:
    """A router of such routes."""
    return APIRouter(prefix=prefix, tags=[tag], route_class=_Route)


def _refuse_unknown(request: Request) -> None:
    """What a route's OpenAPI does not name, a query parameter or an `Idempotency-Key`, is 422.

    And what no text column can hold: in a parameter it is 422, in a path there is no such object.
    """
    path = request.scope["route"].path_format
    operation = request.app.openapi()["paths"].get(path, {}).get(request.method.lower(), {})
    parameters = operation.get("parameters", [])
    known = {parameter["name"] for parameter in parameters if parameter["in"] == "query"}
    headers = {parameter["name"].lower() for parameter in parameters if parameter["in"] == "header"}
    if "idempotency-key" in request.headers and request.method == "POST" and "idempotency-key" not in headers:
        raise not_supported_yet("Idempotency-Key")
    for name in request.query_params:
        if name.partition("[")[0] not in known:
            has = ", ".join(sorted(known)) or "none"
            message = f"{request.method} {path} has no query parameter '{name}'. It has: {has}."
            raise MixloomError("unknown_parameter", message, 422, name)
    for name, value in request.query_params.items():
        if flaw := strict_json.flaw(value):
            raise MixloomError("invalid_request", f"'{name}' {flaw}. Leave it out.", 422, name)
    if any(strict_json.flaw(value) for value in request.path_params.values()):
        raise MixloomError("not_found", "There is no such object: its name holds what is no character.", 404)
