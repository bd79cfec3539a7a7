"""How every failure becomes the one error object. Nothing of a request's body is written to the log."""

import logging
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException

from server.api.services import Services
from server.db.session import is_outage
from server.db.tables import Adapter, Dataset
from server.disk import Disk, is_full
from server.errors import Detail, MixloomError, not_found

log = logging.getLogger(__name__)

_NO_NAMES = ("[key]", "[one]", "[several]")
"""Pydantic's words, and those of `server.job_config`, in the place of a value that no client wrote."""

_NOUNS = {"adapters": ("adapter", Adapter), "datasets": ("dataset", Dataset), "uploads": ("adapter", Adapter)}
"""By the prefix of their keys, in which the id follows."""

_HTTP_CODES = {
    400: "invalid_body",
    404: "unknown_route",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_encoding",
}
_HTTP_MESSAGES = {
    400: "The body could not be read as its Content-Type says. Check both.",
    404: "There is no route {method} {path}. GET /openapi.json lists them all.",
    405: "{path} does not take {method}. GET /openapi.json says what it takes.",
}


def add_error_handlers(app: FastAPI) -> None:
    """Give every expected failure the one error shape of docs/api.md; the middleware does the unexpected ones."""
    app.add_exception_handler(MixloomError, _known)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(SQLAlchemyError, _database)
    app.add_exception_handler(OSError, _os)


def request_id_of(request: Request) -> str | None:
    """The id that the middleware gave the request."""
    request_id: str | None = getattr(request.state, "request_id", None)
    return request_id


def _answer(request: Request, error: MixloomError) -> JSONResponse:
    return JSONResponse(error.as_dict(request_id_of(request)), error.status, error.headers)


def _known(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, MixloomError)
    return _answer(request, error)


def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return _answer(request, validation_error(list(error.errors())))


def validation_error(problems: list[Any]) -> MixloomError:
    """422 from pydantic's list of problems: the first names the code and the parameter, all are details."""
    named = [(_param(problem), _sentence(problem)) for problem in problems]
    param, sentence = named[0]
    return MixloomError(
        _code(problems[0]),
        f"'{param}': {sentence}" if param else sentence,
        422,
        param,
        [Detail(column=name, message=message) for name, message in named] if len(named) > 1 else [],
    )


def _code(problem: dict[str, Any]) -> str:
    if tuple(problem["loc"]) == ("body",):
        return "invalid_body"
    return {
        "extra_forbidden": "unknown_field",
        "json_invalid": "invalid_json",
        "missing": "missing_field",
    }.get(problem["type"], "invalid_request")


def _param(problem: dict[str, Any]) -> str | None:
    if problem["type"] == "json_invalid":
        return None
    location = [str(part) for part in problem["loc"] if part not in _NO_NAMES]
    if location[:1] and location[0] in ("body", "query", "path", "header", "cookie"):
        location = location[1:]
    return ".".join(location) or None


def _sentence(problem: dict[str, Any]) -> str:
    if problem["type"] == "json_invalid":
        return f"The body {problem['ctx']['error']}."
    if problem["type"] == "extra_forbidden":
        return "there is no such field here; check its spelling and its place, or leave it out."
    if tuple(problem["loc"]) == ("body",):
        return "The body must be a JSON object, sent with `Content-Type: application/json`."
    if problem["type"] == "missing":
        return "it is required; add it."
    if problem["type"] == "model_attributes_type":
        return "it must be an object of named fields."
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    value = problem.get("input")
    shown = f" (it is {value!r})" if isinstance(value, str | int | float | bool) and len(repr(value)) <= 80 else ""
    return f"{message[:1].lower()}{message[1:].rstrip('.')}{shown}."


def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    place = {"method": request.method, "path": request.url.path}
    known = _HTTP_MESSAGES.get(error.status_code)
    return _answer(
        request,
        MixloomError(
            _HTTP_CODES.get(error.status_code, "http_error"),
            known.format(**place) if known else error.detail,
            error.status_code,
            headers=dict(error.headers or {}),
        ),
    )


def _database(request: Request, error: Exception) -> JSONResponse:
    """503 while the database cannot be reached, or is too busy; whatever else it says is our mistake."""
    assert isinstance(error, SQLAlchemyError)
    if is_full(error):
        return _no_room(request, error)
    if not is_outage(error):
        return internal_error(request, error)
    log.warning(
        "database_unavailable",
        extra={"fields": {"request_id": request_id_of(request), "reason": str(getattr(error, "orig", error))}},
    )
    return _answer(
        request,
        MixloomError(
            "database_unavailable",
            "The database cannot be reached or is too busy. See whether what you asked for happened, then try again.",
            503,
            headers={"Retry-After": "5"},
        ),
    )


def _os(request: Request, error: Exception) -> JSONResponse:
    """507 for a disk without room, a word of its own for a file that is gone; whatever else it says is our mistake."""
    if is_full(error):
        return _no_room(request, error)
    return _missing(request, error) if isinstance(error, FileNotFoundError) else internal_error(request, error)


def _missing(request: Request, error: FileNotFoundError) -> JSONResponse:
    """404 where it was deleted while the request was under way, row and files."""
    services: Services = request.app.state.services
    match Path(str(error.filename)).parts[len(services.store.root.parts) :]:
        case (prefix, id_, *_) if prefix in _NOUNS:
            noun, table = _NOUNS[prefix]
            with services.database.read() as session:
                if session.get(table, id_) is None:
                    return _answer(request, not_found(noun, id_))
    log.error("file_missing", exc_info=error, extra={"fields": {"request_id": request_id_of(request)}})
    return _answer(
        request,
        MixloomError(
            "file_missing",
            "A file that this needs is not on the server's disk. Tell the operator: `mixloom admin doctor` names it.",
            500,
        ),
    )


def _no_room(request: Request, error: Exception) -> JSONResponse:
    disk: Disk = request.app.state.services.disk
    log.error("disk_full", extra={"fields": {"request_id": request_id_of(request), "reason": str(error)}})
    disk.give_up_ballast()
    return _answer(request, disk.full_error())


def internal_error(request: Request, error: Exception) -> JSONResponse:
    """500 for what only we can cause, with its traceback in the log."""
    fields = {"request_id": request_id_of(request), "method": request.method, "path": request.url.path}
    log.error("internal_error", exc_info=error, extra={"fields": fields})
    return _answer(
        request,
        MixloomError(
            "internal_error",
            f"The server made a mistake; it is in its log under {request_id_of(request)}.",
            500,
        ),
    )
