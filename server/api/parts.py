"""The data sets of a job: looked up, rendered, fitted, some rows of each held out, and what an epoch takes of each."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy.orm import Session

from server import resolve
from server.api.deps import Tenant
from server.api.rendering import renderer_for
from server.api.services import Services
from server.curriculum import apportion
from server.db.datasets import get_dataset
from server.db.tables import Base, Dataset
from server.errors import MixloomError
from server.fit import Fitted, fit_rows, hold_out, num_held_out
from server.ingest.file import read_rows
from server.job_config import DatasetShare, JobConfig
from server.render import render_rows
from server.tokens import TokenRow


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set that a job asks for."""

    dataset: Dataset
    weight: float | None
    param: str
    """Where the request names it."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a job takes of one data set."""

    dataset: Dataset
    weight: float | None
    train_rows: list[TokenRow]
    valid_rows: list[TokenRow]
    notes: list[str]


def find_sources(session: Session, tenant: Tenant, config: JobConfig) -> list[Source]:
    """The data sets to train on. Raises 404, and `dataset_twice`, `weights_incomplete` for a mixture."""
    if isinstance(config.dataset, str):
        return [Source(dataset=find(session, tenant, config.dataset, "dataset"), weight=None, param="dataset")]
    _refuse_unclear(config.dataset)
    return [
        Source(
            dataset=find(session, tenant, share.id, f"dataset.{index}.id"),
            weight=share.weight,
            param=f"dataset.{index}",
        )
        for index, share in enumerate(config.dataset)
    ]


def _refuse_unclear(shares: Sequence[DatasetShare]) -> None:
    ids = [share.id for share in shares]
    for index, share in enumerate(shares):
        if share.id in ids[:index]:
            param = f"dataset.{index}.id"
            message = f"'{param}': data set '{share.id}' is there twice. Name it once, and give it more weight."
            raise MixloomError("dataset_twice", message, 422, param)
    without = [index for index, share in enumerate(shares) if share.weight is None]
    if 0 < len(without) < len(shares):
        param = f"dataset.{without[0]}.weight"
        message = f"'{param}': it is missing, and others have one. Give each data set a weight, or none of them."
        raise MixloomError("weights_incomplete", message, 422, param)


def find(session: Session, tenant: Tenant, dataset_id: str, param: str) -> Dataset:
    """A data set that can be trained on. Raises 404, `dataset_not_ready`, `dataset_failed`."""
    try:
        dataset = get_dataset(session, tenant.tenant_id, dataset_id)
    except MixloomError as error:
        raise replace(error, param=param) from None
    if dataset.status == "uploaded":
        raise MixloomError(
            "dataset_not_ready", f"Data set '{dataset_id}' is still being read. Try again soon.", 409, param
        )
    if dataset.status != "processed":
        raise MixloomError("dataset_failed", f"Data set '{dataset_id}' could not be read. Upload it again.", 422, param)
    return dataset


def take(services: Services, base: Base, config: JobConfig, source: Source) -> Part:
    """A source's rows, less those held out. Raises what `fit_rows` and `num_held_out` do."""
    fitted = fit(services, base, config, source.dataset, source.param)
    count = 0
    if not isinstance(config.validation, str):
        try:
            count = num_held_out(config.validation, len(fitted.rows))
        except MixloomError as error:
            raise replace(error, message=f"Data set '{source.dataset.id}': {error.message}") from None
    train, valid = hold_out(fitted.rows, count, resolve.seed_of(config.training))
    return Part(dataset=source.dataset, weight=source.weight, train_rows=train, valid_rows=valid, notes=fitted.notes)


def fit(services: Services, base: Base, config: JobConfig, dataset: Dataset, param: str) -> Fitted:
    """A data set's rows as the base sees them, those that fit. Raises as `fit_rows`."""
    rows = read_rows(services.store, dataset.id)
    return fit_rows(
        render_rows(renderer_for(services, base), rows, resolve.supervise_of(config.training)),
        cutoff=resolve.cutoff_length(config.training, base, config.preset),
        long_rows=resolve.long_rows_of(config.training),
        param=param,
    )


def mixture_of(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """A job's `mixture`: what it takes of each data set. Raises `weight_too_small` where that is nothing."""
    total = sum(len(part.train_rows) for part in parts)
    weights = [len(part.train_rows) if part.weight is None else part.weight for part in parts]
    counts = apportion(total, weights)
    for index, count in enumerate(counts):
        if count == 0:
            param = f"dataset.{index}.weight"
            raise MixloomError(
                "weight_too_small",
                f"'{param}': it is {weights[index]:g} of {sum(weights):g}, which is no row of the {total} in an epoch. "
                "Raise it, or leave the data set out.",
                422,
                param,
            )
    return [
        {
            "id": part.dataset.id,
            "name": part.dataset.name,
            "sha256": part.dataset.sha256,
            "weight": weight,
            "rows": len(part.train_rows),
            "validation_rows": len(part.valid_rows),
            "epoch_rows": count,
        }
        for part, weight, count in zip(parts, weights, counts, strict=True)
    ]


def sha256_of(parts: Sequence[Part]) -> str:
    """A data set's hash; of several, that of their hashes, a line each."""
    if len(parts) == 1:
        return parts[0].dataset.sha256
    return hashlib.sha256("".join(f"{part.dataset.sha256}\n" for part in parts).encode()).hexdigest()
