"""Statements on data sets."""

from collections.abc import Sequence

from sqlalchemy import bindparam, delete, func, select
from sqlalchemy.orm import Session

from server.db.pages import Listing, Page
from server.db.session import one_at_a_time, read_only, rows
from server.db.tables import Dataset
from server.errors import MixloomError, not_found
from server.settings import MIB

_OF_TENANT = select(Dataset).where(Dataset.tenant_id == bindparam("tenant_id"))
_DATASET = _OF_TENANT.where(Dataset.id == bindparam("dataset_id"))
_BYTES = select(func.coalesce(func.sum(Dataset.bytes), 0)).where(Dataset.tenant_id == bindparam("tenant_id"))
_DATASETS = Listing(_OF_TENANT, identity=Dataset.id, order=(Dataset.created_at, Dataset.id))


def add_dataset(session: Session, dataset: Dataset, most_bytes: int | None) -> None:
    """Its files are in the store before. `most_bytes`: what its tenant's may have together, this one among them.

    Raises 413 `datasets_too_large`.
    """
    if most_bytes is not None:
        one_at_a_time(session, "datasets")
        _refuse_too_many(kept_bytes(session, dataset.tenant_id), dataset.bytes, most_bytes)
    session.add(dataset)


def kept_bytes(session: Session, tenant_id: str) -> int:
    """What a tenant's data sets have together, as they were uploaded."""
    return int(rows(session, _BYTES, {"tenant_id": tenant_id})[0][0])


def _refuse_too_many(kept: int, new: int, most: int) -> None:
    if kept + new > most:
        raise MixloomError(
            "datasets_too_large",
            f"Your data sets may have {most / MIB:g} MiB together; they have {kept / MIB:.2f}, and this one has "
            f"{new / MIB:.2f}. Delete data sets that you do not need (jobs keep their own rows), or ask the operator "
            "for a larger max_datasets_mib.",
            413,
        )


def get_dataset(session: Session, tenant_id: str, dataset_id: str) -> Dataset:
    """A tenant's data set. Raises 404 for one that never was, is gone, or is another's."""
    found = read_only(session, _DATASET, {"tenant_id": tenant_id, "dataset_id": dataset_id})
    if not found:
        raise not_found("dataset", dataset_id)
    return found[0]


def all_keys(session: Session) -> set[str]:
    """The store's keys of every data set."""
    return {f"datasets/{id_}" for id_ in session.scalars(select(Dataset.id))}


def list_datasets(
    session: Session, tenant_id: str, page: Page, filters: Sequence[object] = ()
) -> tuple[list[Dataset], bool]:
    """A page of a tenant's data sets, and whether more follow."""
    return _DATASETS.page(session, page, {"tenant_id": tenant_id}, filters)


def delete_dataset(session: Session, tenant_id: str, dataset_id: str) -> None:
    """Raises 404 as `get_dataset`."""
    get_dataset(session, tenant_id, dataset_id)
    session.execute(delete(Dataset).where(Dataset.tenant_id == tenant_id, Dataset.id == dataset_id))
