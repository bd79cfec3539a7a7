"""What holds for every request: its id, its line in the log, and what a body may be."""

import logging
import time
from collections.abc import Mapping

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import internal_error
from server.ids import new_id
from server.settings import MIB

log = logging.getLogger(__name__)

JSON_BODY_BYTES = 4 * MIB
_PROBES = ("/healthz", "/readyz")  # asked every few seconds: not worth a line


class RequestLine:
    """Gives each request an id (also in `X-Request-Id`), answers what nobody expected, writes one line."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = new_id("req")
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0
        started = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            response = internal_error(Request(scope), error)
            if status:
                raise  # half of an answer is out; the server can only cut the connection
            await response(scope, receive, send_with_id)
        finally:
            fields = {
                "request_id": request_id,
                "tenant_id": scope["state"].get("tenant_id"),
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "milliseconds": round(1000 * (time.perf_counter() - started), 1),
            }
            log.log(
                logging.DEBUG if scope["path"] in _PROBES else logging.INFO,
                "request",
                extra={"fields": fields},
            )


class BodyRules:
    """Refuses encoded bodies, and bodies larger than a request of their type can need."""

    def __init__(self, app: ASGIApp, upload_bytes: Mapping[str, int]):
        """`upload_bytes`: the most that a file may have, by the path that takes it."""
        self.app = app
        self.upload_bytes = upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Request(scope).headers
        encoding = headers.get("content-encoding", "identity")
        multipart = headers.get("content-type", "").startswith("multipart/")
        upload_bytes = self.upload_bytes.get(scope["path"], 0) if multipart else 0
        limit = upload_bytes + MIB if upload_bytes else JSON_BODY_BYTES
        received = 0

        async def receive_ruled() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received and encoding != "identity":
                raise HTTPException(415, f"Content-Encoding '{encoding}' is not taken. Send the body as it is.")
            if received > limit:
                raise HTTPException(413, f"The body has more than {limit // MIB} MiB. Send less at once.")
            return message

        await self.app(scope, receive_ruled, send)
