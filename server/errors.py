"""Errors that a user can cause, each with a stable code, and the one JSON shape they all share."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Detail:
    """One bad place in an upload. Lines and columns count from 1."""

    line: int | None = None
    column: str | None = None
    message: str

    def as_dict(self) -> dict[str, Any]:
        return {"line": self.line, "column": self.column, "message": self.message}


@dataclass
class MixloomError(Exception):
    """A failure to report to the caller. `message` says the rule, the value and the next action."""

    code: str
    message: str
    status: int = 422
    param: str | None = None
    details: list[Detail] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    @property
    def type(self) -> str:
        """The family of the error, as OpenAI's clients name them."""
        if self.status >= 500:
            return "server_error"
        return {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}.get(
            self.status, "invalid_request_error"
        )

    def as_dict(self, request_id: str | None = None) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
                "details": [detail.as_dict() for detail in self.details],
                "request_id": request_id,
            }
        }


def invalid_api_key(said: str) -> MixloomError:
    """401; `said` is what is wrong with the key, as a sentence."""
    return MixloomError(
        "invalid_api_key",
        f"{said} Send `Authorization: Bearer KEY` with a key that your operator made for you.",
        401,
        headers={"WWW-Authenticate": "Bearer"},
    )


def not_found(noun: str, id_: str) -> MixloomError:
    """The same answer for what never was and for what belongs to somebody else."""
    return MixloomError("not_found", f"There is no {noun} '{id_}'. List yours with GET /{noun}s.", 404)


def not_supported_yet(param: str, message: str | None = None) -> MixloomError:
    """A part of the contract that this version does not have: refused, never ignored."""
    return MixloomError("not_supported_yet", message or f"'{param}' is not supported yet; leave it out.", 422, param)
