"""From a prompt to an operation of the daemon, and from its result to an answer."""

import bisect
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from server.api import schemas
from server.api.deps import Tenant
from server.api.rendering import renderer_for
from server.api.services import Services
from server.api.waiting import no_daemon
from server.db import adapters, jobs, operations
from server.db.bases import current_base
from server.db.daemons import is_any_live
from server.db.tables import Adapter, Base, Operation
from server.errors import MixloomError, not_supported_yet
from server.ids import new_id
from server.job_config import MAX_SEED
from server.render import Renderer

DEFAULT_MAX_TOKENS = 256
DEADLINE_SECONDS = 600.0
REQUEST_FILE = "request.json"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A sample that the daemon was asked for."""

    operation_id: str
    key: str
    renderer: Renderer
    prompt_tokens: list[int]
    body: schemas.Generate


def ask(services: Services, tenant: Tenant, body: schemas.Generate) -> Asked:
    """Put an operation before the daemon. Raises `MixloomError` for what cannot be asked, 503 `no_daemon`."""
    if body.stream:
        raise not_supported_yet("stream")
    if body.max_tokens == 0 and not body.logprobs:
        raise MixloomError(
            "nothing_asked",
            "With max_tokens 0 there is nothing to answer but logprobs; set it.",
            422,
            "logprobs",
        )
    with services.database.read() as session:
        base = current_base(session)
        adapter = _model(session, tenant, body.model, base)
        if not is_any_live(session):
            raise no_daemon()
    renderer = renderer_for(services, base)
    messages = None if body.messages is None else [message.model_dump() for message in body.messages]
    prompt_tokens = renderer.prompt(prompt=body.prompt, messages=messages, raw=body.raw)
    request = {
        "tokens": prompt_tokens,
        "max_tokens": _max_tokens(body, len(prompt_tokens), base.context),
        "temperature": body.temperature,
        "top_k": body.top_k,
        "top_p": body.top_p,
        "seed": secrets.randbelow(MAX_SEED) if body.seed is None else body.seed,
        "stop_tokens": renderer.stop_tokens,
        "logprobs": body.logprobs,
    }
    id_ = new_id("gen")
    key = f"operations/{id_}"
    services.store.put(key, lambda folder: _write_json(folder / REQUEST_FILE, request))
    with services.naming(key, tenant.tenant_id) as session:
        operations.add_sample(
            session,
            id_=id_,
            tenant_id=tenant.tenant_id,
            adapter_id=adapter.id if adapter else None,
            base_hash=base.hash,
            key=key,
            deadline=time.time() + DEADLINE_SECONDS,
        )
    return Asked(operation_id=id_, key=key, renderer=renderer, prompt_tokens=prompt_tokens, body=body)


def answer(services: Services, asked: Asked, operation: Operation) -> dict[str, Any]:
    """What an ended operation came to; its files and its row are erased. Raises the daemon's error."""
    failed = operation.status == operations.FAILED  # then a last line may be half of one
    lines = [] if failed else _lines(services.store.path(asked.key) / operations.result_file(operation))
    with services.database.write() as session:
        operations.remove(session, asked.operation_id)
    services.store.delete(asked.key)
    if failed:
        error = operation.error or {"category": "server", "code": "internal_error", "message": "It failed."}
        if error["code"] == "disk_full":
            raise services.disk.full_error()
        raise MixloomError(error["code"], error["message"], 422 if error["category"] == "user" else 500)
    tokens = [token for line in lines for token in line.get("tokens", [])]
    logprobs = [value for line in lines for value in line.get("logprobs") or []]
    whole = asked.renderer.decode(tokens)
    text = _before(whole, asked.body.stop)
    count = len(tokens) if text == whole else _num_tokens(asked.renderer, tokens, len(text))
    return {
        "id": asked.operation_id,
        "object": "generation",
        "model": asked.body.model,
        "text": text,
        "tokens": tokens[:count],
        "prompt_tokens": asked.prompt_tokens,
        "logprobs": logprobs[:count] if asked.body.logprobs else None,
        "prompt_logprobs": next((line["prompt_logprobs"] for line in lines if "prompt_logprobs" in line), None),
        "finish_reason": lines[-1]["finish_reason"] if text == whole else "stop",
        "usage": {"prompt_tokens": len(asked.prompt_tokens), "completion_tokens": count},
    }


def give_up(services: Services, asked: Asked, error: MixloomError) -> None:
    """Nobody waits for it any more. Its files go later (`forget_unread`): the daemon may be writing."""
    with services.database.write() as session:
        operations.give_up(
            session, asked.operation_id, {"category": "server", "code": error.code, "message": error.message}
        )


def _model(session: Session, tenant: Tenant, model: str, base: Base) -> Adapter | None:
    """The adapter to ask; None for the bare base."""
    if model == "base":
        return None
    if not model.startswith("job_"):
        return adapters.usable_adapter(session, tenant.tenant_id, model, base, "model")
    try:
        adapter = adapters.newest_checkpoint(session, jobs.get_job(session, tenant.tenant_id, model))
    except MixloomError as error:
        raise replace(error, param="model") from None
    adapters.refuse_other_base(adapter, base, "model")
    return adapter


def _max_tokens(body: schemas.Generate, num_prompt_tokens: int, context: int) -> int:
    asked = body.max_tokens
    room = context - num_prompt_tokens
    if room < 0 or (room == 0 and asked != 0):
        raise MixloomError(
            "prompt_too_long",
            f"The prompt has {num_prompt_tokens} tokens, and the base's context {context}, which the answer "
            "must fit into as well. Shorten the prompt.",
            422,
            "prompt" if body.messages is None else "messages",
        )
    if asked is not None and asked > room:
        raise MixloomError(
            "max_tokens_too_large",
            f"'max_tokens' is {asked}; after a prompt of {num_prompt_tokens} tokens the context of {context} "
            f"leaves {room}. Ask for fewer.",
            422,
            "max_tokens",
        )
    return min(DEFAULT_MAX_TOKENS, room) if asked is None else asked


def _before(text: str, stop: Sequence[str]) -> str:
    """What comes before the first of the stop texts."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


def _num_tokens(renderer: Renderer, tokens: list[int], num_characters: int) -> int:
    """The fewest of the tokens, from the first on, whose text has so many characters."""

    def decoded(count: int) -> int:
        return len(renderer.decode(tokens[:count]))

    return bisect.bisect_left(range(len(tokens)), num_characters, key=decoded)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
