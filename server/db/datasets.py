"""Statements on data sets."""

from collections.abc import Sequence

from sqlalchemy import bindparam, delete, select
from sqlalchemy.orm import Session

from server.db.pages import Listing, Page
from server.db.session import read_only
from server.db.tables import Dataset
from server.errors import not_found

_OF_TENANT = select(Dataset).where(Dataset.tenant_id == bindparam("tenant_id"))
_DATASET = _OF_TENANT.where(Dataset.id == bindparam("dataset_id"))
_DATASETS = Listing(_OF_TENANT, identity=Dataset.id, order=(Dataset.created_at, Dataset.id))


def add_dataset(session: Session, dataset: Dataset) -> None:
    """Its files are in the store before."""
    session.add(dataset)


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
