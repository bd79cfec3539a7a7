"""From a request to a kept data set: options checked, content obtained, every row checked, all published.

Uploads and hub sets alike are settled within the request: a 201 means checked and durable. What is here takes
long (parsing, tokenising, the hub's child process) and runs in a worker thread.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from starlette.datastructures import FormData, UploadFile

from server import strict_json
from server.api.deps import Tenant
from server.api.rendering import renderer_for
from server.api.schemas import Name, StrictModel, validated
from server.api.services import Services
from server.db import datasets
from server.db.bases import current_base
from server.db.tables import Dataset
from server.errors import MixloomError
from server.hub import HubSplit, fetch
from server.ids import new_id
from server.ingest.file import CONTENT_FILE, ROWS_FILE, format_of, histogram, ingest
from server.settings import MIB, Settings
from server.store import manifest

HubOption = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f]+$")]


class DatasetOptions(StrictModel):
    """What may be said of a data set wherever it comes from."""

    name: Name | None = None
    columns: dict[str, str] | None = Field(None, description="Our name of a column -> the file's.")


class HubDataset(DatasetOptions):
    """A data set by its name on the hub."""

    hub: str = Field(description="org/name.")
    config: HubOption | None = Field(None, description="For a data set that has several.")
    split: HubOption = Field("train", description="A split, or its first rows: train[:1000].")
    revision: HubOption | None = Field(None, description="A branch, tag or commit. The answer names the commit.")


REQUEST_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {
                    "file": {"type": "string", "format": "binary", "description": "JSONL, CSV or Parquet."},
                    "name": {"type": "string", "description": "Default: the file's."},
                    "columns": {
                        "type": "string",
                        "description": 'Our name of a column -> the file\'s, as JSON: {"prompt": "question"}.',
                    },
                },
            }
        },
        "application/json": {"schema": HubDataset.model_json_schema()},
    },
}
"""Of `POST /datasets`, for OpenAPI: the two ways to give a data set."""


def key_of(dataset_id: str) -> str:
    """Where the store keeps a data set's files."""
    return f"datasets/{dataset_id}"


def refuse_too_large(settings: Settings, num_bytes: int) -> None:
    """Raises 413 `dataset_too_large` for more bytes than an upload may have."""
    if num_bytes > settings.max_upload_mib * MIB:
        raise MixloomError(
            "dataset_too_large",
            f"An upload may have {settings.max_upload_mib} MiB; this has {num_bytes / MIB:.1f}. Split the "
            "file, or ask the operator for a larger max_upload_mib.",
            413,
            "file",
        )


def keep_upload(services: Services, tenant: Tenant, form: FormData) -> Dataset:
    """Keep the file of a multipart form, if every row is good. Raises as `ingest`, and for the fields."""
    upload = form.get("file")
    if not isinstance(upload, UploadFile):
        raise MixloomError("missing_field", "'file' is required: send the data as a file part.", param="file")
    refuse_too_large(services.settings, upload.size or 0)
    fields: dict[str, Any] = {name: value for name, value in form.items() if name != "file"}
    if isinstance(fields.get("columns"), str):
        try:
            fields["columns"] = strict_json.parse(fields["columns"])
        except ValueError as error:
            raise MixloomError("invalid_columns", f"'columns' {error}.", param="columns") from None
    options = validated(DatasetOptions, fields)
    file_name = Path(upload.filename or "upload").name[:200]

    def obtain(content: Path) -> dict[str, Any]:
        with content.open("wb") as file:
            shutil.copyfileobj(upload.file, file)
        return {"format": format_of(content, file_name), "source": {"file": file_name}}

    return _keep(services, tenant, options.name or file_name, options.columns, obtain)


def keep_hub_dataset(services: Services, tenant: Tenant, body: Any) -> Dataset:
    """Fetch a hub data set and keep it, if every row is good. Raises as `ingest` and `fetch`."""
    options = validated(HubDataset, body)

    wanted = HubSplit(options.hub, options.config, options.split, options.revision)

    def obtain(content: Path) -> dict[str, Any]:
        commit = fetch(wanted, content, services.settings.max_upload_mib * MIB)
        source = {"hub": wanted.name, "config": wanted.config, "split": wanted.split, "revision": commit}
        return {"format": "hub", "source": source}

    return _keep(services, tenant, options.name or options.hub, options.columns, obtain)


def _keep(
    services: Services,
    tenant: Tenant,
    name: str,
    columns: dict[str, str] | None,
    obtain: Callable[[Path], dict[str, Any]],
) -> Dataset:
    """Publish the files of a data set, then its row. `obtain` writes the content; says format and source."""
    with services.database.read() as session:
        base = current_base(session)
    renderer = renderer_for(services, base)
    dataset_id = new_id("ds")
    found: dict[str, Any] = {}

    def write(folder: Path) -> None:
        content = folder / CONTENT_FILE
        found.update(obtain(content))
        shape, lengths = ingest(content, folder / ROWS_FILE, found["format"], columns or {}, renderer)
        tokens = {"total": int(lengths.sum()), "histogram": histogram(lengths), "base_hash": base.hash}
        found.update(shape=shape, rows=len(lengths), tokens=tokens)

    kept = manifest(services.store.put(key_of(dataset_id), write))
    dataset = Dataset(
        id=dataset_id,
        tenant_id=tenant.tenant_id,
        name=name,
        status="processed",
        columns=columns,
        created_by=tenant.key_id,
        created_at=time.time(),
        manifest=kept,
        **kept[CONTENT_FILE],
        **found,
    )
    most = services.settings.max_datasets_mib
    with services.naming(key_of(dataset_id), tenant.tenant_id) as session:
        datasets.add_dataset(session, dataset, None if most is None else most * MIB)
    return dataset
