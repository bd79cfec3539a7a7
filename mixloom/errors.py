"""What can go wrong between a client and a server, as exceptions that carry the server's own words."""

from typing import Any

import httpx


class MixloomError(Exception):
    """A request that failed. `str()` of it is a sentence with the rule, the value and the next action.

    `code` is stable and meant for programs; `status` is the HTTP status, None when no server answered;
    `details` are the bad places of an upload: `{"line", "column", "message"}`.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        status: int | None = None,
        param: str | None = None,
        details: list[dict[str, Any]] | None = None,
        request_id: str | None = None,
    ):
        super().__init__(message)
        self.message = message
        self.code = code
        self.status = status
        self.param = param
        self.details = details or []
        self.request_id = request_id


class ServerUnreachable(MixloomError):
    """Nobody answered at that address, or the connection broke."""


def error_of(response: httpx.Response) -> MixloomError:
    """The exception for an answer of 400 and above, whoever wrote it: our server, or a proxy before it."""
    try:
        body = response.json()["error"]
        return MixloomError(
            body["message"],
            code=body["code"],
            status=response.status_code,
            param=body["param"],
            details=body["details"],
            request_id=body["request_id"],
        )
    except (ValueError, KeyError, TypeError):
        return MixloomError(
            f"{response.request.url} answered {response.status_code} {response.reason_phrase}, but not as a "
            "Mixloom server does. Check the URL.",
            code="not_a_mixloom_server",
            status=response.status_code,
        )
