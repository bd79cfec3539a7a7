"""Statements on the queue as a whole: what an outlook needs, read in one snapshot."""

import time
from collections import defaultdict
from collections.abc import Sequence

from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

from server.db.bases import find_base
from server.db.daemons import live_daemons, tokens_per_second
from server.db.drains import open_drain
from server.db.tables import Daemon, Job, Tenant
from server.outlook import OpenDrain, Outlook, QueuedJob, Service
from server.states import RESIDENT, JobStatus

_ACTIVE = (JobStatus.QUEUED, *RESIDENT)


def read_outlook(session: Session, *, max_resident_runs: int, tenant_id: str | None = None) -> Outlook:
    """The queue now. With `tenant_id` no other tenant's jobs are read: they do not matter to its answers."""
    live = live_daemons(session)
    drain = open_drain(session)
    num_resident = session.scalar(select(func.count()).where(Job.status.in_(RESIDENT))) or 0
    return Outlook(
        now=time.time(),
        is_daemon_live=bool(live),
        services=_services(session, live),
        drain=OpenDrain(reason=drain.reason) if drain else None,
        tokens_per_second=tokens_per_second(session),
        free_places=max(0, max_resident_runs * max(1, len(live)) - num_resident),
        shares=_shares(session),
        jobs=_active_jobs(session, tenant_id),
    )


def _services(session: Session, live: Sequence[Daemon]) -> dict[str, Service]:
    """Of the bases of live daemons, and of the one that is in force while a daemon still loads it."""
    base = find_base(session)
    services = {base.hash: Service()} if base else {}
    for base_hash in {one.base_hash for one in live if one.base_hash}:
        of_base = [one for one in live if one.base_hash == base_hash]
        drains = [open_drain(session, one.name) for one in of_base]
        in_force = [drain for drain in drains if drain is not None]
        services[base_hash] = Service(
            drain=OpenDrain(reason=in_force[0].reason) if len(in_force) == len(of_base) else None,
            is_disk_full=all(one.state == "disk_full" for one in of_base),
        )
    return services


def _shares(session: Session) -> dict[str, float]:
    active = select(Job.tenant_id).where(Job.status.in_(_ACTIVE))
    tenants = session.execute(select(Tenant.id, Tenant.share).where(Tenant.id.in_(active)))
    shares = {row.id: row.share for row in tenants}
    total = sum(shares.values())
    return {tenant_id: share / total for tenant_id, share in shares.items()}


def _active_jobs(session: Session, tenant_id: str | None) -> dict[str, list[QueuedJob]]:
    is_waiting = case((Job.status.in_(RESIDENT), 0), else_=1)
    statement = (
        select(Job.tenant_id, Job.id, Job.status, Job.weight, Job.total_tokens - Job.tokens)
        .where(Job.status.in_(_ACTIVE))
        .order_by(is_waiting, Job.weight.desc(), Job.number)
    )
    if tenant_id is not None:
        statement = statement.where(Job.tenant_id == tenant_id)
    jobs: dict[str, list[QueuedJob]] = defaultdict(list)
    for tenant, id_, status, weight, tokens_left in session.execute(statement):
        jobs[tenant].append(QueuedJob(id=id_, status=status, weight=weight, tokens_left=tokens_left))
    return jobs
