"""Statements on the queue as a whole: what an outlook needs, read in one snapshot."""

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Float, bindparam, case, cast, func, or_, select

from server.db.among import among, is_one_of
from server.db.bases import NEWEST
from server.db.daemons import IS_LIVE, tokens_per_second
from server.db.drains import IS_IN_FORCE, first_for, open_drains
from server.db.runs import SUSPECTS, suspects
from server.db.session import Reader, rows
from server.db.tables import Base, Daemon, Drain, Job, Tenant
from server.outlook import EndingTenant, OpenDrain, Outlook, QueuedJob, Service
from server.states import RESIDENT, JobStatus, Reason

MOST_ADDED = 50
"""A tenant with more jobs is reckoned to go on: who asks shall not wait until a long queue is added up."""
_STATUS = Job.metadata.tables["jobs"].c.status
_IS_RESIDENT = is_one_of(_STATUS, RESIDENT)
_IS_ACTIVE = is_one_of(_STATUS, (JobStatus.QUEUED, *RESIDENT))
_BUSY = select(Tenant.share).where(select(Job.id).where(Job.tenant_id == Tenant.id, _IS_ACTIVE).exists()).subquery()
_STATE = select(
    NEWEST.with_only_columns(Base.hash).scalar_subquery().label("newest_hash"),
    select(func.count()).where(_IS_RESIDENT).scalar_subquery().label("num_resident"),
    select(func.sum(_BUSY.c.share)).scalar_subquery().label("total_share"),
    select(Drain.id).where(IS_IN_FORCE).exists().label("is_drained"),
    SUSPECTS.exists().label("is_suspected"),
).subquery()
_STATE_AND_DAEMONS = select(_STATE, Daemon).outerjoin_from(_STATE, Daemon, IS_LIVE).order_by(Daemon.epoch.desc())
_ACTIVE = select(Job.base_hash, Job.status).where(among(Job.metadata.tables["jobs"].c.id, "ids"), _IS_ACTIVE)
_LEFT = cast(Job.total_tokens - Job.tokens, Float)
_FEW = (
    select(_LEFT.label("left"))
    .where(Job.tenant_id == Tenant.id, _IS_ACTIVE)
    .correlate(Tenant)
    .limit(MOST_ADDED + 1)
    .subquery()
)
_SUM = select(case((func.count() <= MOST_ADDED, func.sum(_FEW.c.left)))).select_from(_FEW).scalar_subquery()
_ENDING = select(Tenant.share, _SUM).where(Tenant.id.in_(select(Job.tenant_id).where(_IS_RESIDENT)))
_ORDER: dict[str, Any] = {
    "partition_by": Job.tenant_id,
    "order_by": (case((_IS_RESIDENT, 0), else_=1), Job.weight.desc(), Job.number),
}
_QUEUES = (
    select(
        *(Job.tenant_id, Tenant.share, Job.id, Job.status, Job.weight, _LEFT.label("tokens_left")),
        func.row_number().over(**_ORDER).label("place"),
        func.sum(_LEFT).over(**_ORDER).label("tokens_until"),
        (func.coalesce(Job.reason, "") == Reason.MEMORY).label("waits_for_memory"),
    )
    .join(Tenant, Tenant.id == Job.tenant_id)
    .where(Job.tenant_id.in_(bindparam("tenant_ids", expanding=True)), _IS_ACTIVE)
    .subquery()
)
_JOBS = (
    select(_QUEUES)
    .where(or_(_QUEUES.c.place <= bindparam("places"), _QUEUES.c.id.in_(bindparam("job_ids", expanding=True))))
    .order_by(_QUEUES.c.place)
)


def read_outlook(reader: Reader, jobs: Sequence[Job], *, max_resident_runs: int) -> Outlook:
    """The queue now, as far as it matters to these jobs."""
    found = rows(reader, _STATE_AND_DAEMONS)
    state, live = found[0], [row for row in found if row.epoch is not None]
    drains = open_drains(reader) if state.is_drained else []
    drain = first_for(drains)
    tried = rows(reader, _ACTIVE, {"ids": suspects(reader)}) if state.is_suspected else []
    ending = rows(reader, _ENDING) if state.num_resident else []
    num_places = max_resident_runs * max(1, len(live))
    wanted = {"tenant_ids": sorted({job.tenant_id for job in jobs}), "job_ids": [job.id for job in jobs]}
    shares: dict[str, float] = {}
    queues: dict[str, list[QueuedJob]] = defaultdict(list)
    for tenant_id, share, *queued in rows(reader, _JOBS, {**wanted, "places": max(num_places, MOST_ADDED)}):
        shares[tenant_id] = share / state.total_share
        queues[tenant_id].append(QueuedJob(*queued))
    return Outlook(
        now=time.time(),
        is_daemon_live=bool(live),
        services=_services(state.newest_hash, live, drains, tried),
        drain=OpenDrain(reason=drain.reason) if drain else None,
        tokens_per_second=tokens_per_second(reader, live),
        free_places=max(0, num_places - state.num_resident),
        shares=shares,
        ending=[EndingTenant(share / state.total_share, left) for share, left in ending if left is not None],
        jobs=queues,
    )


def _services(
    newest_hash: str | None, live: Sequence[Daemon], drains: Sequence[Drain], tried: Sequence[Any]
) -> dict[str, Service]:
    """Of the bases of live daemons, and of the one that is in force while a daemon still loads it.

    `tried`: (base_hash, status) of the jobs that are tried alone. One that waits keeps all daemons of its base from
    taking others in; one that trains keeps its own.
    """
    services = {newest_hash: Service()} if newest_hash else {}
    for base_hash in {one.base_hash for one in live if one.base_hash}:
        of_base = [one for one in live if one.base_hash == base_hash]
        statuses = [one.status for one in tried if one.base_hash == base_hash]
        in_force = [drain for one in of_base if (drain := first_for(drains, one.name)) is not None]
        services[base_hash] = Service(
            drain=OpenDrain(reason=in_force[0].reason) if len(in_force) == len(of_base) else None,
            is_disk_full=all(one.state == "disk_full" for one in of_base),
            is_trying=JobStatus.QUEUED in statuses or 0 < len(of_base) - len(in_force) <= len(statuses),
        )
    return services
