"""Routes that read JSON strictly and refuse what they do not know. Every router of the app is made here."""

import json
import math
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from server.errors import MixloomError, not_supported_yet


def parse_json(body: bytes) -> Any:
    """The value of a JSON text. Stricter than Python: no NaN, no infinity, no key twice, no bottomless
    nesting. Raises `json.JSONDecodeError`.
    """
    try:
        return json.loads(body, object_pairs_hook=_each_key_once, parse_constant=_finite, parse_float=_finite)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("it is nested too deeply", "", 0) from None
    except ValueError as error:  # not UTF-8, a key twice, a number out of range
        raise json.JSONDecodeError(str(error), "", 0) from None


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return mapping


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is not a finite number")
    return value


class _StrictRequest(Request):
    async def json(self) -> Any:
        return parse_json(await self.body())


class _StrictRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_strictly


def new_router(*, prefix: str = "", tag: str) -> APIRouter:
    """A router whose routes parse JSON with `parse_json`."""
    return APIRouter(prefix=prefix, tags=[tag], route_class=_StrictRoute)


def refuse_unknown(request: Request) -> None:
    """For every route: a query parameter that its OpenAPI does not name is 422; so is `Idempotency-Key`."""
    if "idempotency-key" in request.headers and request.method == "POST":
        raise not_supported_yet("Idempotency-Key")
    path = request.scope["route"].path_format
    operation = request.app.openapi()["paths"].get(path, {}).get(request.method.lower(), {})
    known = {parameter["name"] for parameter in operation.get("parameters", []) if parameter["in"] == "query"}
    for name in request.query_params:
        if name.partition("[")[0] not in known:
            has = ", ".join(sorted(known)) or "none"
            message = f"{request.method} {path} has no query parameter '{name}'. It has: {has}."
            raise MixloomError("unknown_parameter", message, 422, name)
