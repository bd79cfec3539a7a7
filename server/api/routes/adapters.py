"""Adapters: what a job made or a tenant sent, as files."""

from pathlib import Path
from typing import Annotated, Any

from fastapi import Header, Query, Request, Response
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool

from server.adapter_files import WEIGHTS
from server.api.adapter_intake import REQUEST_BODY, keep_adapter, refuse_too_large
from server.api.answers import adapter_answer
from server.api.archive import ArchiveFormat, archive_response
from server.api.deps import NEEDS_ROOM, ServicesDep, Tenant, TenantDep
from server.api.lists import PageDep, list_answer
from server.api.routing import new_router
from server.api.services import Services
from server.db import adapters
from server.db.tables import Adapter
from server.errors import MixloomError
from server.settings import MIB
from server.store import sha256_of

router = new_router(prefix="/adapters", tag="adapters")


@router.post("", status_code=201, dependencies=[NEEDS_ROOM], openapi_extra={"requestBody": REQUEST_BODY})
async def upload_adapter(
    tenant: TenantDep, services: ServicesDep, request: Request, response: Response
) -> dict[str, Any]:
    """Keep an adapter that PEFT (LoRA, DoRA) or the package mixlora saved, if it fits the base in force.

    Its tensors must be those that its config means on this base, by name and by shape, and finite; they are kept in
    float32. What its config asks for beyond that is refused by name. `warnings` says when it names another base.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        raise MixloomError(
            "unsupported_media_type",
            f"An adapter comes as multipart/form-data with the parts config and weights, not as '{media_type}'.",
            415,
        )
    refuse_too_large(services.settings, int(request.headers.get("content-length", 0)) - MIB)
    async with request.form(max_files=2, max_fields=4) as form:
        adapter, warnings = await run_in_threadpool(keep_adapter, services, tenant, form)
    response.headers["Location"] = f"/adapters/{adapter.id}"
    return {**adapter_answer(adapter), "warnings": warnings}


@router.get("")
def list_adapters(
    services: ServicesDep, tenant: TenantDep, page: PageDep, name: Annotated[str | None, Query()] = None
) -> dict[str, Any]:
    """Your adapters, checkpoints of your jobs among them."""
    with services.database.read() as session:
        found, has_more = adapters.list_adapters(session, tenant.tenant_id, page, name=name)
    return list_answer([adapter_answer(adapter) for adapter in found], has_more)


@router.get("/{adapter_id}")
def get_adapter(services: ServicesDep, tenant: TenantDep, adapter_id: str) -> dict[str, Any]:
    """What an adapter is and where it comes from."""
    return adapter_answer(_get(services, tenant, adapter_id))


@router.delete("/{adapter_id}")
def delete_adapter(services: ServicesDep, tenant: TenantDep, adapter_id: str) -> dict[str, Any]:
    """Forget an adapter and its files. The job that made it stays."""
    with services.database.write() as session:
        key = adapters.delete_adapter(session, adapters.get_adapter(session, tenant.tenant_id, adapter_id))
    services.store.delete(key)
    return {"id": adapter_id, "object": "adapter", "deleted": True}


@router.get("/{adapter_id}/files")
def list_files(services: ServicesDep, tenant: TenantDep, adapter_id: str) -> dict[str, Any]:
    """An adapter's files by name, with their hashes."""
    adapter = _get(services, tenant, adapter_id)
    data = [
        {
            "id": path.name,
            "object": "file",
            "name": path.name,
            "bytes": path.stat().st_size,
            "sha256": _sha256(adapter, path),
        }
        for path in _files(services, adapter).values()
    ]
    return list_answer(data, has_more=False)


@router.get("/{adapter_id}/files/{name}", response_class=FileResponse)
def get_file(
    services: ServicesDep,
    tenant: TenantDep,
    adapter_id: str,
    name: str,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """One file; `Range` is honoured, `ETag` is its sha256."""
    adapter = _get(services, tenant, adapter_id)
    path = _files(services, adapter).get(name)
    if path is None:
        raise MixloomError(
            "not_found",
            f"Adapter '{adapter_id}' has no file '{name}'. List them with GET /adapters/{adapter_id}/files.",
            404,
        )
    etag = f'"{_sha256(adapter, path)}"'
    if if_none_match == etag:
        return Response(status_code=304, headers={"ETag": etag})
    return FileResponse(path, stat_result=path.stat(), filename=name, headers={"ETag": etag})


@router.get("/{adapter_id}/archive", response_class=Response)
def get_archive(
    services: ServicesDep, tenant: TenantDep, adapter_id: str, format: ArchiveFormat = "native"
) -> Response:
    """All files as one uncompressed zip, the same bytes each time."""
    return archive_response(services, _get(services, tenant, adapter_id), format)


def _get(services: Services, tenant: Tenant, adapter_id: str) -> Adapter:
    with services.database.read() as session:
        return adapters.get_adapter(session, tenant.tenant_id, adapter_id)


def _files(services: Services, adapter: Adapter) -> dict[str, Path]:
    """The adapter's files by name. A client's name is looked up here and never made into a path."""
    return {path.name: path for path in sorted(services.store.path(adapter.key).iterdir())}


def _sha256(adapter: Adapter, path: Path) -> str:
    known = (adapter.manifest or {WEIGHTS: {"sha256": adapter.sha256}}).get(path.name)
    return str(known["sha256"]) if known else sha256_of(path)
