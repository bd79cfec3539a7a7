"""Statements on adapters. The daemon inserts those of jobs (`server.db.runs`); they never change."""

from dataclasses import replace
from typing import Any

from sqlalchemy import Select, bindparam, delete, select, update
from sqlalchemy.orm import Session

from server.db.pages import Listing, Page
from server.db.tables import Adapter, Base, Job
from server.errors import MixloomError, not_found
from server.states import ENDED

BEST_FIRST = (Adapter.valid_loss, Adapter.step)
_OF_TENANT = select(Adapter).where(Adapter.tenant_id == bindparam("tenant_id"))
_ADAPTERS = Listing(_OF_TENANT, identity=Adapter.id, order=(Adapter.created_at, Adapter.id))
_CHECKPOINTS = Listing(
    _OF_TENANT.where(Adapter.job_id == bindparam("job_id")), identity=Adapter.id, order=(Adapter.step, Adapter.id)
)


def add_adapter(session: Session, adapter: Adapter) -> None:
    """Publish one that was uploaded."""
    session.add(adapter)


def get_adapter(session: Session, tenant_id: str, adapter_id: str) -> Adapter:
    """Raises 404 for an adapter that is not this tenant's."""
    adapter = session.scalar(select(Adapter).where(Adapter.tenant_id == tenant_id, Adapter.id == adapter_id))
    if adapter is None:
        raise not_found("adapter", adapter_id)
    return adapter


def usable_adapter(session: Session, tenant_id: str, adapter_id: str, base: Base, param: str) -> Adapter:
    """An adapter of this base. Raises 404, and `adapter_of_other_base`."""
    try:
        adapter = get_adapter(session, tenant_id, adapter_id)
    except MixloomError as error:
        raise replace(error, param=param) from None
    refuse_other_base(adapter, base, param)
    return adapter


def refuse_other_base(adapter: Adapter, base: Base, param: str) -> None:
    """Raises `adapter_of_other_base`."""
    if adapter.base_hash != base.hash:
        raise MixloomError(
            "adapter_of_other_base",
            f"Adapter '{adapter.id}' was trained on '{adapter.base_name}' ({adapter.base_hash}), and this "
            f"server has '{base.name}' ({base.hash}). Download it, or ask the operator for its base.",
            422,
            param,
        )


def list_adapters(
    session: Session, tenant_id: str, page: Page, *, name: str | None = None
) -> tuple[list[Adapter], bool]:
    """A page of a tenant's adapters, and whether more follow."""
    filters = [] if name is None else [Adapter.name == name]
    return _ADAPTERS.page(session, page, {"tenant_id": tenant_id}, filters)


def _of_job(job: Job) -> Select[Any]:
    return select(Adapter).where(Adapter.tenant_id == job.tenant_id, Adapter.job_id == job.id)


def list_checkpoints(session: Session, job: Job, page: Page) -> tuple[list[Adapter], bool]:
    """A page of a job's adapters in the order of their steps, and whether more follow."""
    return _CHECKPOINTS.page(session, page, {"tenant_id": job.tenant_id, "job_id": job.id})


def newest_checkpoint(session: Session, job: Job) -> Adapter:
    """The job's adapter of the last step that has one. Raises 409 `no_adapter_yet`, 404 `no_adapter`."""
    adapter: Adapter | None = session.scalar(_of_job(job).order_by(Adapter.step.desc()).limit(1))
    if adapter is not None:
        return adapter
    if job.status in ENDED:
        raise MixloomError("no_adapter", f"Job '{job.id}' is {job.status} and has no adapter.", 404)
    raise MixloomError(
        "no_adapter_yet", f"Job '{job.id}' is {job.status} and has no checkpoint yet. Try again later.", 409
    )


def find_checkpoint(session: Session, job: Job, name: str) -> Adapter | None:
    """The job's adapter with this step (decimal digits) or this id."""
    wanted = Adapter.step == int(name) if name.isdecimal() and len(name) < 10 else Adapter.id == name
    adapter: Adapter | None = session.scalar(_of_job(job).where(wanted))
    return adapter


def best_checkpoint(session: Session, job: Job) -> Adapter | None:
    """The job's adapter of lowest validation loss; of two that are equal the earlier."""
    adapter: Adapter | None = session.scalar(
        _of_job(job).where(Adapter.valid_loss.is_not(None)).order_by(*BEST_FIRST).limit(1)
    )
    return adapter


def all_keys(session: Session) -> set[str]:
    """The store's keys of every adapter."""
    return set(session.scalars(select(Adapter.key)))


def delete_adapter(session: Session, adapter: Adapter) -> str:
    """Forget an adapter, and let go of it the job that ended with it; the key to delete from the store.

    Its job is locked before: it may be about to end with this one.
    """
    session.execute(select(Job.id).where(Job.id == adapter.job_id).with_for_update())
    session.execute(update(Job).where(Job.adapter_id == adapter.id).values(adapter_id=None))
    session.execute(delete(Adapter).where(Adapter.id == adapter.id))
    return adapter.key
