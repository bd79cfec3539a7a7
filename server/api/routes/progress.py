"""What a job leaves behind while it trains: events, metrics, checkpoints, its adapter as one file."""

import csv
import io
from typing import Annotated, Any, Literal

from fastapi import Header, Query, Response
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session

from server.api.answers import adapter_answer, expert_loads_answer
from server.api.archive import ArchiveFormat, archive_response
from server.api.deps import ServicesDep, TenantDep
from server.api.lists import PageDep, list_answer
from server.api.routing import new_router
from server.db import adapters, events, jobs, metrics
from server.db.tables import Adapter, Event, Job
from server.errors import MixloomError, not_supported_yet
from server.job_config import MAX_STEPS

router = new_router(prefix="/jobs/{job_id}", tag="jobs")

AcceptHeader = Annotated[str, Header()]


@router.get("/events")
def list_events(
    services: ServicesDep, tenant: TenantDep, page: PageDep, job_id: str, accept: AcceptHeader = "*/*"
) -> dict[str, Any]:
    """What happened to the job, newest first unless `order=asc`."""
    with services.database.look() as reader:
        job = jobs.get_job(reader, tenant.tenant_id, job_id)
        if "text/event-stream" in accept:
            raise not_supported_yet("Accept", "Streams of events are not supported yet; ask for pages of JSON.")
        found, has_more = events.list_events(reader, job, page)
    return list_answer([_event_answer(event) for event in found], has_more)


@router.get("/metrics")
def get_metrics(
    services: ServicesDep,
    tenant: TenantDep,
    job_id: str,
    from_step: Annotated[int, Query(ge=0, le=MAX_STEPS)] = 0,
    every: Annotated[int | None, Query(ge=1, le=MAX_STEPS, description="Each so many steps.")] = None,
    format: Annotated[Literal["json", "csv"] | None, Query()] = None,
    accept: AcceptHeader = "*/*",
) -> Response:
    """A row a step. Above 10,000 they are thinned; `every` (in CSV the header `X-Every`) says how much.

    A job on several data sets has a column `train_loss.ID` for each, empty where a step had no row of it, and
    `valid_loss.ID` where rows of each are held out.
    """
    with services.database.look() as reader:
        job = jobs.get_job(reader, tenant.tenant_id, job_id)
        rows, thinned = metrics.read_metrics(reader, job, from_step=from_step, every=every)
    columns = metrics.column_names(job)
    if format == "csv" or (format is None and "text/csv" in accept):
        text = io.StringIO()
        csv.writer(text).writerows([columns, *rows])
        return Response(text.getvalue(), media_type="text/csv", headers={"X-Every": str(thinned)})
    return JSONResponse({"object": "metrics", "columns": columns, "rows": rows, "every": thinned})


@router.get("/checkpoints")
def list_checkpoints(services: ServicesDep, tenant: TenantDep, page: PageDep, job_id: str) -> dict[str, Any]:
    """The job's adapters, newest first unless `order=asc`; each can be downloaded and asked at once."""
    with services.database.read() as session:
        job = jobs.get_job(session, tenant.tenant_id, job_id)
        found, has_more = adapters.list_checkpoints(session, job, page)
    return list_answer([adapter_answer(adapter) for adapter in found], has_more)


@router.get("/experts")
def list_expert_loads(services: ServicesDep, tenant: TenantDep, page: PageDep, job_id: str) -> dict[str, Any]:
    """How a step's tokens were spread over the experts, for the last step and each tenth before it; newest first.

    `loads` are parts of a layer's `slots` (tokens · top_k) and sum to 1; `mean` and `std` are over the experts,
    those of a step averaged over its layers.
    """
    with services.database.read() as session:
        job = jobs.get_job(session, tenant.tenant_id, job_id)
        if job.adapter["num_experts"] is None:
            raise MixloomError(
                "no_experts",
                f"Job '{job.id}' has the method '{job.adapter['method']}', which has no experts. Ask for those of a "
                "job with method 'mixlora'.",
                422,
            )
        found, has_more = metrics.list_expert_loads(session, job, page)
    return list_answer([expert_loads_answer(kept) for kept in found], has_more)


@router.get("/adapter", response_class=Response)
def download_adapter(
    services: ServicesDep,
    tenant: TenantDep,
    job_id: str,
    format: ArchiveFormat = "native",
    checkpoint: Annotated[
        str | None, Query(description="`best`, a step, or an adapter's id. Default: the last step.")
    ] = None,
) -> Response:
    """All files of one of the job's adapters, as an uncompressed zip."""
    with services.database.read() as session:
        adapter = _choose(session, jobs.get_job(session, tenant.tenant_id, job_id), checkpoint)
    return archive_response(services, adapter, format)


def _choose(session: Session, job: Job, checkpoint: str | None) -> Adapter:
    if checkpoint is None:
        return adapters.newest_checkpoint(session, job)
    if checkpoint == "best":
        found = adapters.best_checkpoint(session, job)
        if found is None:
            raise MixloomError(
                "no_best_checkpoint",
                f"Job '{job.id}' has no checkpoint with a validation loss.",
                404,
                "checkpoint",
            )
        return found
    found = adapters.find_checkpoint(session, job, checkpoint)
    if found is None:
        raise MixloomError(
            "not_found",
            f"The job has no checkpoint '{checkpoint}'. List them with GET /jobs/{job.id}/checkpoints.",
            404,
            "checkpoint",
        )
    return found


def _event_answer(event: Event) -> dict[str, Any]:
    return {
        "id": str(event.id),
        "object": "event",
        "kind": event.kind,
        "message": event.message,
        "data": event.data,
        "created_at": event.created_at,
    }
