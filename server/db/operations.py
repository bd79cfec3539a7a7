"""Statements on operations: interactive work that the API asks for and the daemon does."""

import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import bindparam, delete, func, select, update
from sqlalchemy.orm import Session

from server.db.session import Reader, rows
from server.db.tables import Operation

PENDING, RUNNING, DONE, FAILED = "pending", "running", "done", "failed"
_ANY_PENDING = (
    select(Operation.id).where(Operation.status == PENDING, Operation.base_hash == bindparam("base_hash")).limit(1)
)
MAX_ATTEMPTS = 2
_CRASHED = {
    "category": "server",
    "code": "crashed_daemon",
    "message": "The engine died twice while it computed this answer. Ask with another prompt or another adapter.",
}


def add_sample(
    session: Session,
    *,
    id_: str,
    tenant_id: str,
    adapter_id: str | None,
    base_hash: str,
    key: str,
    deadline: float,
) -> None:
    """Ask the daemon for a sample; its request is already in the store under `key`."""
    session.add(
        Operation(
            id=id_,
            tenant_id=tenant_id,
            adapter_id=adapter_id,
            base_hash=base_hash,
            kind="sample",
            status=PENDING,
            key=key,
            deadline=deadline,
            created_at=time.time(),
        )
    )


def find_ended(session: Session, ids: Sequence[str]) -> list[Operation]:
    """Those of the given operations that are done or failed."""
    return list(session.scalars(select(Operation).where(Operation.id.in_(ids), Operation.status.in_((DONE, FAILED)))))


def give_up(session: Session, id_: str, error: dict[str, Any]) -> None:
    """Fail an operation that nobody waits for any more, so that the daemon does not begin it."""
    session.execute(
        update(Operation)
        .where(Operation.id == id_, Operation.status.in_((PENDING, RUNNING)))
        .values(status=FAILED, error=error, finished_at=time.time())
    )


def remove(session: Session, id_: str) -> None:
    """Forget an operation that was answered."""
    session.execute(delete(Operation).where(Operation.id == id_))


def remove_all(session: Session) -> None:
    """Of a copy of the tables: nobody waits there for an answer."""
    session.execute(delete(Operation))


def count_waiting(session: Session) -> int:
    """How many operations, on any base, have no answer yet."""
    waiting = select(func.count()).where(Operation.status.in_((PENDING, RUNNING)))
    return session.scalar(waiting) or 0


def all_keys(session: Session) -> set[str]:
    """The store's keys of every operation."""
    return set(session.scalars(select(Operation.key)))


def any_pending(reader: Reader, base_hash: str) -> bool:
    """Whether an operation on this base waits."""
    return bool(rows(reader, _ANY_PENDING, {"base_hash": base_hash}))


def start_pending(session: Session, base_hash: str, epoch: int) -> list[Operation]:
    """Take every operation on this base that waits, the oldest first; none that another daemon is about to take."""
    waiting = select(Operation).where(Operation.status == PENDING, Operation.base_hash == base_hash)
    taken = list(session.scalars(waiting.order_by(Operation.created_at).with_for_update(skip_locked=True)))
    for operation in taken:
        operation.status, operation.lease_epoch = RUNNING, epoch
        operation.attempts += 1
    return taken


def result_file(operation: Operation) -> str:
    """The file that its answer is in. A life that was overtaken goes on writing to another one."""
    return f"result-{operation.lease_epoch}.jsonl"


def finish(session: Session, ids: Sequence[str], error: dict[str, Any] | None) -> None:
    """End operations as done, or as failed with an error; those that were given up stay as they are."""
    session.execute(
        update(Operation)
        .where(Operation.id.in_(ids), Operation.status == RUNNING)
        .values(status=FAILED if error else DONE, error=error, finished_at=time.time())
    )


def release(session: Session, epochs: Sequence[int], *, crashed: bool) -> None:
    """What lives that are over were doing waits again; what was in its second crash fails."""
    held = update(Operation).where(Operation.status == RUNNING, Operation.lease_epoch.in_(epochs))
    if crashed:
        failed = held.where(Operation.attempts >= MAX_ATTEMPTS)
        session.execute(failed.values(status=FAILED, error=_CRASHED, finished_at=time.time()))
    session.execute(held.values(status=PENDING))
