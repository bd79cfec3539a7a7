"""From what a tenant asks for to a job in the queue: look up, render, fit, resolve, keep."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from sqlalchemy.orm import Session

from server import resolve
from server.api.deps import Tenant
from server.api.errors import validation_error
from server.api.parts import Part, find, find_sources, fit, mixture_of, sha256_of, take
from server.api.services import Services
from server.curriculum import Mixture, tokens_of_steps
from server.db import idempotency, jobs
from server.db.adapters import usable_adapter
from server.db.bases import current_base
from server.db.idempotency import Sent
from server.db.tables import Adapter, Base
from server.errors import MixloomError, not_found
from server.ids import new_id
from server.job_config import MAX_NAME, JobConfig, JobCreate
from server.starts import Damaged, copy_start
from server.states import JobStatus
from server.store import manifest
from server.tokens import TokenRow, TokenRows


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job that could be queued as it is: everything resolved, its rows rendered."""

    config: JobConfig
    base: Base
    parts: list[Part]
    mixture: list[dict[str, Any]] | None
    """Of a job that mixes data sets: what it takes of each."""
    start: Adapter | None
    """The adapter whose weights are the first ones."""
    adapter: dict[str, Any]
    training: dict[str, Any]
    validation: dict[str, Any]
    train_rows: list[TokenRow]
    valid_rows: list[TokenRow]
    notes: list[str]
    """What the tenant should know: warnings, rows left out."""

    @property
    def total_tokens(self) -> int:
        """Tokens that the job trains on, all epochs."""
        return tokens_of_steps(
            self.training["total_steps"],
            mixture=Mixture.of(self.mixture, len(self.train_rows)),
            lengths=TokenRows.of(self.train_rows).lengths,
            batch_size=self.training["batch_size"],
            seed=self.training["seed"],
        )


def prepare(services: Services, tenant: Tenant, body: JobCreate) -> Submission:
    """All that a submission checks, without keeping anything. Raises `MixloomError` for what is wrong."""
    with services.database.read() as session:
        config = _whole_config(session, tenant, body)
        resolve.refuse_unsupported(config)
        base = _base(session, config)
        sources = find_sources(session, tenant, config)
        other = config.validation if isinstance(config.validation, str) else None
        valid_dataset = None if other is None else find(session, tenant, other, "validation")
        start = _start(session, tenant, config, base)
    adapter = resolve.resolve_adapter(config.adapter, base, config.preset, start.config if start else None)
    parts = [take(services, base, config, source) for source in sources]
    notes = [*resolve.warnings_of(adapter), *(note for part in parts for note in part.notes)]
    train = [row for part in parts for row in part.train_rows]
    valid = [row for part in parts for row in part.valid_rows]
    if valid_dataset is not None:
        fitted = fit(services, base, config, valid_dataset, "validation")
        notes += fitted.notes
        valid = fitted.rows
        validation: dict[str, Any] = {"rows": len(valid), "dataset": valid_dataset.id}
    else:
        validation = {"rows": len(valid), "fraction": len(valid) / (len(train) + len(valid))}
    return Submission(
        config=config,
        base=base,
        parts=parts,
        mixture=None if isinstance(config.dataset, str) else mixture_of(parts),
        start=start,
        adapter=adapter,
        training=resolve.resolve_training(
            config.training, base, config.preset, num_rows=len(train), num_validation_rows=len(valid)
        ),
        validation=validation,
        train_rows=train,
        valid_rows=valid,
        notes=notes,
    )


def submit(services: Services, tenant: Tenant, submission: Submission, sent: Sent | None) -> str:
    """Keep a job: its tokens in the store, then its rows in one transaction. Durable when this returns.

    Its id; that of another one, and nothing is kept, when the request was `sent` twice at the same time.
    """
    rows = {"train": submission.train_rows, "valid": submission.valid_rows}

    def write(folder: Path) -> None:
        for name, part in rows.items():
            if part:
                TokenRows.of(part).save(folder / f"{name}.safetensors")
        if submission.start is not None:
            _copy_start(services, submission.start, folder)

    id_ = new_id("job")
    key = f"jobs/{id_}"
    kept = manifest(services.store.put(key, write))
    job = {"id": id_, "tokens_key": key, "tokens_manifest": kept, **_columns(tenant, submission)}
    with services.naming(key, tenant.tenant_id) as session:
        made = id_ if sent is None else idempotency.claim(session, sent, id_)
        if made == id_:
            jobs.add_job(session, job, submission.notes)
    if made != id_:
        services.store.delete(key)
    return made


def _copy_start(services: Services, start: Adapter, folder: Path) -> None:
    try:
        copy_start(services.store.path(start.key), folder, start.sha256)
    except FileNotFoundError:  # it was deleted a moment ago
        raise replace(not_found("adapter", start.id), param="init_from") from None
    except Damaged:
        message = f"The files of adapter '{start.id}' on the server are damaged. Start from another one."
        raise MixloomError("adapter_unreadable", message, 500, "init_from") from None


def _columns(tenant: Tenant, submission: Submission) -> dict[str, Any]:
    """Of a new job, but for its id and its rows."""
    config = submission.config
    priority = config.priority or "normal"
    start = submission.start
    names = " + ".join(part.dataset.name for part in submission.parts)
    return {
        "tenant_id": tenant.tenant_id,
        "name": config.name or names[:MAX_NAME],
        "request": config.model_dump(exclude_unset=True),
        "status": JobStatus.QUEUED,
        "base_name": submission.base.name,
        "base_hash": submission.base.hash,
        "dataset_id": submission.parts[0].dataset.id,
        "dataset_sha256": sha256_of(submission.parts),
        "mixture": submission.mixture,
        "validation": submission.validation,
        "init_from": None if start is None else {"adapter": start.id, "sha256": start.sha256},
        "adapter": submission.adapter,
        "training": submission.training,
        "priority": priority,
        "weight": resolve.PRIORITIES[priority],
        "labels": config.metadata,
        "total_steps": submission.training["total_steps"],
        "total_tokens": submission.total_tokens,
        "created_by": tenant.key_id,
        "created_at": time.time(),
    }


def _whole_config(session: Session, tenant: Tenant, body: JobCreate) -> JobConfig:
    """What was asked for, over what the job that it starts from was asked for."""
    asked = body.model_dump(exclude_unset=True, exclude={"source"})
    if body.source is not None:
        try:
            asked = merged(jobs.get_job(session, tenant.tenant_id, body.source).request, asked)
        except MixloomError as error:
            raise replace(error, param="from") from None
    try:
        return JobConfig.model_validate(asked)
    except ValidationError as error:
        raise validation_error(list(error.errors())) from None


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """A config with changes: a value of `new` wins, null makes it `auto` again, the rest stays as in `old`.

    Of `epochs` and `max_steps` the one that `new` gives replaces the other.
    """
    whole = {**old, **new}
    for part in ("adapter", "training"):
        whole[part] = {**old.get(part, {}), **new.get(part, {})}
    for name, other in (("epochs", "max_steps"), ("max_steps", "epochs")):
        changes = new.get("training", {})
        if changes.get(name) is not None and other not in changes:
            whole["training"].pop(other, None)
    return whole


def _base(session: Session, config: JobConfig) -> Base:
    base = current_base(session)
    if config.base not in (None, base.name, base.hash):
        raise MixloomError(
            "unknown_base",
            f"The base '{config.base}' is not served here; '{base.name}' is. Name that, or leave 'base' out.",
            422,
            "base",
        )
    return base


def _start(session: Session, tenant: Tenant, config: JobConfig, base: Base) -> Adapter | None:
    if config.init_from is None:
        return None
    return usable_adapter(session, tenant.tenant_id, config.init_from, base, "init_from")
