"""Data sets: uploaded or fetched from the hub, listed, paged through, given back, deleted."""

import json
from typing import Annotated, Any

from fastapi import Query, Request, Response
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool

from server.api.deps import NEEDS_ROOM, ServicesDep, Tenant, TenantDep
from server.api.intake import (
    REQUEST_BODY,
    keep_hub_dataset,
    keep_upload,
    key_of,
    refuse_too_large,
)
from server.api.lists import PageDep, list_answer
from server.api.rendering import renderer_for
from server.api.routing import new_router
from server.api.services import Services
from server.db import datasets
from server.db.bases import current_base
from server.db.tables import Dataset
from server.errors import MixloomError
from server.ingest.file import CONTENT_FILE, read_rows
from server.render import render_rows
from server.settings import MIB

router = new_router(prefix="/datasets", tag="datasets")

_MEDIA_TYPES = {
    "csv": "text/csv",
    "jsonl": "application/jsonl",
    "hub": "application/jsonl",
    "parquet": "application/vnd.apache.parquet",
}


@router.post("", status_code=201, dependencies=[NEEDS_ROOM], openapi_extra={"requestBody": REQUEST_BODY})
async def create_dataset(
    tenant: TenantDep, services: ServicesDep, request: Request, response: Response
) -> dict[str, Any]:
    """Keep an uploaded file (multipart), or the rows of a hub data set (JSON), if every row is good."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        refuse_too_large(services.settings, int(request.headers.get("content-length", 0)) - MIB)
        async with request.form(max_files=1, max_fields=8) as form:
            dataset = await run_in_threadpool(keep_upload, services, tenant, form)
    elif media_type == "application/json":
        try:
            body = await request.json()
        except json.JSONDecodeError as error:
            raise MixloomError("invalid_json", f"The body {error.msg}.") from None
        dataset = await run_in_threadpool(keep_hub_dataset, services, tenant, body)
    else:
        raise MixloomError(
            "unsupported_media_type",
            f"A data set comes as multipart/form-data (a file) or application/json (a hub name), not as "
            f"'{media_type}'. Set Content-Type.",
            415,
        )
    response.headers["Location"] = f"/datasets/{dataset.id}"
    return _answer(dataset)


@router.get("")
def list_datasets(
    tenant: TenantDep,
    services: ServicesDep,
    page: PageDep,
    name: Annotated[str | None, Query()] = None,
    status: Annotated[str | None, Query()] = None,
) -> dict[str, Any]:
    """Your data sets."""
    filters = [column == value for column, value in ((Dataset.name, name), (Dataset.status, status)) if value]
    with services.database.read() as session:
        found, has_more = datasets.list_datasets(session, tenant.tenant_id, page, filters)
    return list_answer([_answer(dataset) for dataset in found], has_more)


@router.get("/{dataset_id}")
def get_dataset(tenant: TenantDep, services: ServicesDep, dataset_id: str) -> dict[str, Any]:
    """A data set with its rows, tokens and hash as counted at the upload."""
    return _answer(_find(services, tenant, dataset_id))


@router.delete("/{dataset_id}")
def delete_dataset(tenant: TenantDep, services: ServicesDep, dataset_id: str) -> dict[str, Any]:
    """Jobs made from it go on: each keeps its own tokens."""
    with services.database.write() as session:
        datasets.delete_dataset(session, tenant.tenant_id, dataset_id)
    services.store.delete(key_of(dataset_id))
    return {"id": dataset_id, "object": "dataset", "deleted": True}


@router.get("/{dataset_id}/rows")
def list_rows(
    tenant: TenantDep,
    services: ServicesDep,
    dataset_id: str,
    limit: Annotated[int, Query(ge=1, le=100, description="Most rows in the answer.")] = 20,
    after: Annotated[int, Query(ge=-1, description="The `last_id` of the page before.")] = -1,
) -> dict[str, Any]:
    """Rows in their order, as they will be trained on, each with its tokens for the base of today.

    A row's id is its number, from 0.
    """
    dataset = _find(services, tenant, dataset_id)
    if after >= dataset.rows:
        raise MixloomError(
            "unknown_cursor",
            f"The data set has {dataset.rows} rows, so none comes after {after}.",
            400,
            "after",
        )
    rows = read_rows(services.store, dataset_id, after + 1, after + 1 + limit)
    with services.database.read() as session:
        base = current_base(session)
    renderer = renderer_for(services, base)
    data = [
        {"id": str(number), "object": "dataset.row", "row": row, "tokens": len(rendered.tokens)}
        for number, (row, rendered) in enumerate(
            zip(rows, render_rows(renderer, rows, "completion"), strict=True), after + 1
        )
    ]
    return list_answer(data, after + 1 + len(rows) < dataset.rows)


@router.get("/{dataset_id}/content")
def get_content(tenant: TenantDep, services: ServicesDep, dataset_id: str) -> FileResponse:
    """The bytes as they were uploaded; of a hub data set, its rows as JSON Lines."""
    dataset = _find(services, tenant, dataset_id)
    source = dataset.source or {}
    path = services.store.path(key_of(dataset_id)) / CONTENT_FILE
    return FileResponse(
        path,
        stat_result=path.stat(),
        media_type=_MEDIA_TYPES[dataset.format],
        filename=source.get("file") or f"{dataset_id}.jsonl",
        headers={"ETag": f'"{dataset.sha256}"'},
    )


def _find(services: Services, tenant: Tenant, dataset_id: str) -> Dataset:
    with services.database.read() as session:
        return datasets.get_dataset(session, tenant.tenant_id, dataset_id)


def _answer(dataset: Dataset) -> dict[str, Any]:
    return {
        "id": dataset.id,
        "object": "dataset",
        "name": dataset.name,
        "status": dataset.status,
        "format": dataset.format,
        "shape": dataset.shape,
        "columns": dataset.columns,
        "source": dataset.source,
        "rows": dataset.rows,
        "tokens": dataset.tokens,
        "bytes": dataset.bytes,
        "sha256": dataset.sha256,
        "created_by": dataset.created_by,
        "created_at": dataset.created_at,
    }
