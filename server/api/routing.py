"""Routes that read JSON strictly and refuse what they do not know. Every router of the app is made here."""

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

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


class _StrictRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_strictly


def new_router(*, prefix: str = "", tag: str) -> APIRouter:
    """A router whose routes read JSON strictly."""
    return APIRouter(prefix=prefix, tags=[tag], route_class=_StrictRoute)


async def refuse_unknown(request: Request) -> None:
    """For every route: what its OpenAPI does not name, a query parameter or an `Idempotency-Key`, is 422.

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
