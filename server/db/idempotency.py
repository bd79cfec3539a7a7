"""Statements on idempotency keys: who sends a request again within a day, makes nothing new."""

import time
from dataclasses import dataclass

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from server.db.session import one_at_a_time
from server.db.tables import IdempotencyKey
from server.errors import MixloomError

KEPT_SECONDS = 86400.0


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A request that is to be carried out once."""

    tenant_id: str
    key: str
    body_sha256: str


def made_by(session: Session, sent: Sent) -> str | None:
    """The id of what this request has made before, if it was sent before.

    Raises 422 `idempotency_key_reused` when it was another request.
    """
    its = select(IdempotencyKey).where(IdempotencyKey.tenant_id == sent.tenant_id, IdempotencyKey.key == sent.key)
    found = session.scalar(its.where(IdempotencyKey.created_at >= time.time() - KEPT_SECONDS))
    if found is None:
        return None
    if found.body_sha256 != sent.body_sha256:
        raise MixloomError(
            "idempotency_key_reused",
            "This Idempotency-Key was sent with another body within the last 24 hours. Send a new key with each new "
            "request, and the same one only to send the same request again.",
            422,
            "Idempotency-Key",
        )
    return found.job_id


def claim(session: Session, sent: Sent, job_id: str) -> str:
    """Keep that this request makes a job; the id of another one that it has made just before. Raises as `made_by`."""
    one_at_a_time(session, "idempotency_keys")
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at < time.time() - KEPT_SECONDS))
    made = made_by(session, sent)
    if made is None:
        session.add(IdempotencyKey(**vars(sent), job_id=job_id, created_at=time.time()))
    return made or job_id
