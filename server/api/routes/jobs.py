"""Jobs: submitted, looked at, stopped, forgotten. What a job leaves behind is in `progress`."""

import hashlib
import json
import re
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Header, Query, Response
from sqlalchemy.orm import Session

from server import memory, resolve
from server.api.answers import dataset_answer, job_answers
from server.api.deps import ServicesDep, Tenant, TenantDep
from server.api.lists import METADATA_PARAMETER, MetadataDep, PageDep, list_answer
from server.api.routing import new_router
from server.api.services import Services
from server.api.submission import prepare, submit
from server.db import idempotency, jobs
from server.db.idempotency import Sent
from server.db.queue import tokens_per_second
from server.db.tables import Job
from server.errors import MixloomError
from server.job_config import METADATA_KEY, JobCreate
from server.states import JobStatus

router = new_router(prefix="/jobs", tag="jobs")


@router.post("", status_code=201)
def create_job(
    services: ServicesDep,
    tenant: TenantDep,
    body: JobCreate,
    response: Response,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> dict[str, Any]:
    """A job in the queue. Once this is answered nothing but its tenant keeps it from ending.

    With the header `Idempotency-Key` the same request makes one job, however often it is sent within 24 hours; another
    body with the same key is 422 `idempotency_key_reused`.
    """
    sent = None if idempotency_key is None else _sent(tenant, idempotency_key, body)
    id_ = _made_before(services, sent)
    if id_ is None:
        services.disk.refuse_if_low()
        id_ = submit(services, tenant, prepare(services, tenant, body), sent)
    response.headers["Location"] = f"/jobs/{id_}"
    return _answer(services, tenant, id_)


def _sent(tenant: Tenant, key: str, body: JobCreate) -> Sent:
    said = json.dumps(body.model_dump(mode="json", exclude_unset=True), sort_keys=True)
    return Sent(tenant_id=tenant.tenant_id, key=key, body_sha256=hashlib.sha256(said.encode()).hexdigest())


def _made_before(services: Services, sent: Sent | None) -> str | None:
    """Looked up before the body, and the room for it, are examined: what it names may be gone since."""
    if sent is None:
        return None
    with services.database.read() as session:
        return idempotency.made_by(session, sent)


@router.post("/estimate")
def estimate_job(services: ServicesDep, tenant: TenantDep, body: JobCreate) -> dict[str, Any]:
    """What a job would be and cost; nothing is kept. `seconds` is null until the daemon has trained."""
    submission = prepare(services, tenant, body)
    with services.database.read() as session:
        speed = tokens_per_second(session, submission.base.hash)
    parameters = resolve.num_parameters(submission.adapter, submission.base)
    tokens = submission.total_tokens
    return {
        "object": "estimate",
        "base": {"name": submission.base.name, "hash": submission.base.hash},
        "dataset": dataset_answer(submission.mixture) or submission.parts[0].dataset.id,
        "mixture": submission.mixture,
        "adapter": submission.adapter,
        "training": submission.training,
        "validation": submission.validation,
        "rows": len(submission.train_rows),
        "steps": submission.training["total_steps"],
        "tokens": tokens,
        "seconds": tokens / speed if speed else None,
        "parameters": parameters,
        "bytes": {
            "adapter": parameters * resolve.BYTES_PER_PARAMETER,
            "recovery_point": memory.recovery_bytes(submission.adapter, submission.base),
            "memory": memory.resident_bytes(submission.adapter, submission.base),
            "token_of_a_pass": memory.token_bytes(submission.adapter, submission.base)
            if submission.base.memory
            else None,
        },
        "warnings": submission.notes,
    }


@router.get("", openapi_extra=METADATA_PARAMETER)
def list_jobs(
    services: ServicesDep,
    tenant: TenantDep,
    page: PageDep,
    metadata: MetadataDep,
    status: JobStatus | None = None,
    name: Annotated[str | None, Query()] = None,
) -> dict[str, Any]:
    """Your jobs; `metadata[team]=blue` finds those that you labelled so."""
    for key in metadata:
        if not re.fullmatch(METADATA_KEY, key):
            raise MixloomError(
                "invalid_request",
                f"'{key}' cannot be a key of metadata: {METADATA_KEY}.",
                422,
                f"metadata[{key}]",
            )
    with services.database.look() as reader:
        found, has_more = jobs.list_jobs(reader, tenant.tenant_id, page, status=status, name=name, labels=metadata)
        return list_answer(job_answers(reader, found), has_more)


@router.get("/{job_id}")
def get_job(services: ServicesDep, tenant: TenantDep, job_id: str) -> dict[str, Any]:
    """A job as it is now.

    `adapter_id` is what it ended with; of one that failed with the code `diverged`, its last good state, if any.
    """
    return _answer(services, tenant, job_id)


@router.post("/{job_id}/cancel")
def cancel_job(services: ServicesDep, tenant: TenantDep, job_id: str) -> dict[str, Any]:
    """End it for good. Checkpoints that it has made stay. Again is no error."""
    return _change(services, tenant, job_id, jobs.cancel)


@router.post("/{job_id}/pause")
def pause_job(services: ServicesDep, tenant: TenantDep, job_id: str) -> dict[str, Any]:
    """Keep it from training, without losing a step. `requested` shows `pause` until that is safe."""
    return _change(services, tenant, job_id, jobs.pause)


@router.post("/{job_id}/resume")
def resume_job(services: ServicesDep, tenant: TenantDep, job_id: str) -> dict[str, Any]:
    """Let it train again, from the step at which it was paused."""
    return _change(services, tenant, job_id, jobs.resume)


@router.delete("/{job_id}")
def delete_job(services: ServicesDep, tenant: TenantDep, job_id: str) -> dict[str, Any]:
    """Forget an ended job with its tokens, metrics, events and adapters."""
    with services.database.write() as session:
        keys = jobs.delete_job(session, jobs.lock_job(session, tenant.tenant_id, job_id))
    for key in keys:
        services.store.delete(key)
    return {"id": job_id, "object": "job", "deleted": True}


def _change(services: Services, tenant: Tenant, job_id: str, change: Callable[[Session, Job], None]) -> dict[str, Any]:
    with services.database.write() as session:
        change(session, jobs.lock_job(session, tenant.tenant_id, job_id))
    return _answer(services, tenant, job_id)


def _answer(services: Services, tenant: Tenant, job_id: str) -> dict[str, Any]:
    with services.database.look() as reader:
        job = jobs.get_job(reader, tenant.tenant_id, job_id)
        return job_answers(reader, [job])[0]
