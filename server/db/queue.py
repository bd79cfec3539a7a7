"""Statements on the queue as a whole: what an outlook needs, read in one snapshot."""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import BindParameter, Float, Select, bindparam, case, cast, func, literal_column, or_, select, true

from server.db.among import among, is_one_of
from server.db.bases import NEWEST
from server.db.daemons import IS_LIVE, live_daemons
from server.db.drains import IS_IN_FORCE, first_for, open_drains
from server.db.runs import SUSPECTS, suspects
from server.db.session import Reader, read_only, rows
from server.db.tables import Base, Daemon, Drain, Job, Run, Tenant
from server.outlook import EndingTenant, OpenDrain, Outlook, Queue, QueuedJob, Service
from server.states import RESIDENT, JobStatus, Reason

MOST_ADDED = 50
"""A tenant with more jobs is reckoned to go on: who asks shall not wait until a long queue is added up."""
_JOB, _RESIDENT = (Job.metadata.tables["jobs"].alias(name).c for name in ("job", "resident"))
_IS_RESIDENT = is_one_of(_RESIDENT.status, RESIDENT)
_IS_ACTIVE = is_one_of(_JOB.status, (JobStatus.QUEUED, *RESIDENT))
_BASE_HASHES: BindParameter[list[str]] = bindparam("base_hashes", expanding=True)
_STATE = select(
    NEWEST.with_only_columns(Base.hash).scalar_subquery().label("newest_hash"),
    select(_RESIDENT.id).where(_IS_RESIDENT).exists().label("is_any_resident"),
    select(Drain.id).where(IS_IN_FORCE).exists().label("is_drained"),
    SUSPECTS.exists().label("is_suspected"),
).subquery()
_STATE_AND_DAEMONS = select(_STATE, Daemon).outerjoin_from(_STATE, Daemon, IS_LIVE).order_by(Daemon.epoch.desc())
_LAST = select(Daemon).where(Daemon.base_hash == bindparam("base_hash")).order_by(Daemon.epoch.desc()).limit(1)
_ACTIVE = select(_JOB.base_hash, _JOB.status).where(among(_JOB.id, "ids"), _IS_ACTIVE)
_LEFT = cast(_JOB.total_tokens - _JOB.tokens, Float)
_FEW = (
    select(_LEFT.label("left"))
    .where(_JOB.tenant_id == Tenant.id, _JOB.base_hash == _RESIDENT.base_hash, _IS_ACTIVE)
    .limit(MOST_ADDED + 1)
    .correlate(Tenant, _RESIDENT.id.table)
    .subquery()
)
_SUM = select(case((func.count() <= MOST_ADDED, func.sum(_FEW.c.left)))).select_from(_FEW).scalar_subquery()
_IS_HELD = Run.lease_epoch.in_(bindparam("epochs", expanding=True))
_TENANTS = (
    select(
        _RESIDENT.base_hash, Tenant.share, func.sum(case((_IS_HELD, 1), else_=0)).label("num_held"), _SUM.label("left")
    )
    .join(Run, Run.job_id == _RESIDENT.id)
    .join(Tenant, Tenant.id == _RESIDENT.tenant_id)
    .where(_IS_RESIDENT)
    .group_by(_RESIDENT.base_hash, Tenant.id)
)
"""Of each with a resident run."""
_ANY: Select[Any] = (
    select(literal_column("1")).where(_JOB.tenant_id == Tenant.id, _JOB.base_hash == Base.hash, _IS_ACTIVE).limit(1)
)
"""Asked so, and not whether it exists, PostgreSQL looks for one job of each tenant; else it goes through all jobs."""
_SHARES = (
    select(Base.hash, func.sum(Tenant.share).label("total_share"))
    .join(Tenant, true())
    .where(Base.hash.in_(_BASE_HASHES), _ANY.scalar_subquery().is_not(None))
    .group_by(Base.hash)
    .cte("shares")
)
_ORDER: dict[str, Any] = {
    "partition_by": (_JOB.tenant_id, _JOB.base_hash),
    "order_by": (case((is_one_of(_JOB.status, RESIDENT), 0), else_=1), _JOB.weight.desc(), _JOB.number),
}
_QUEUES = (
    select(
        *(_JOB.base_hash, Tenant.share, _JOB.tenant_id, _SHARES.c.total_share),
        *(_JOB.id, _JOB.status, _JOB.weight, _LEFT.label("tokens_left")),
        func.row_number().over(**_ORDER).label("place"),
        func.sum(_LEFT).over(**_ORDER).label("tokens_until"),
        (func.coalesce(_JOB.reason, "") == Reason.MEMORY).label("waits_for_memory"),
    )
    .join(Tenant, Tenant.id == _JOB.tenant_id)
    .join(_SHARES, _SHARES.c.hash == _JOB.base_hash)
    .where(_JOB.tenant_id.in_(bindparam("tenant_ids", expanding=True)), _IS_ACTIVE)
    .subquery()
)
_JOBS = (
    select(_QUEUES)
    .where(or_(_QUEUES.c.place <= bindparam("places"), _QUEUES.c.id.in_(bindparam("job_ids", expanding=True))))
    .order_by(_QUEUES.c.place)
)


def read_outlook(reader: Reader, jobs: Sequence[Job]) -> Outlook:
    """The queues now, as far as they matter to these jobs."""
    found = rows(reader, _STATE_AND_DAEMONS)
    state, live = found[0], [row for row in found if row.epoch is not None]
    drains = open_drains(reader) if state.is_drained else []
    drain = first_for(drains)
    tried = rows(reader, _ACTIVE, {"ids": suspects(reader)}) if state.is_suspected else []
    by_base = _by_base(state.newest_hash, live)
    at_work = {hash_: _at_work(by_base.get(hash_, []), drains) for hash_ in sorted({job.base_hash for job in jobs})}
    return Outlook(
        now=time.time(),
        is_daemon_live=bool(live),
        services={base_hash: _service(base_hash, of_base, drains, tried) for base_hash, of_base in by_base.items()},
        drain=OpenDrain(reason=drain.reason) if drain else None,
        queues=_read_queues(reader, jobs, at_work, is_any_resident=state.is_any_resident),
    )


def tokens_per_second(reader: Reader, base_hash: str) -> float | None:
    """What the daemons of a base do together; of its last one when there are none; None before any has trained."""
    live = [one for one in live_daemons(reader) if one.base_hash == base_hash]
    return _speed(_at_work(live or read_only(reader, _LAST, {"base_hash": base_hash}), open_drains(reader)))


def _by_base(newest_hash: str | None, live: Sequence[Daemon]) -> dict[str, list[Daemon]]:
    """The live daemons of each base. While none has loaded one, they are of the base that is in force."""
    by_base: dict[str, list[Daemon]] = defaultdict(list)
    for one in live:
        if one.base_hash is not None:
            by_base[one.base_hash].append(one)
    return by_base or ({newest_hash: list(live)} if newest_hash and live else {})


def _at_work(daemons: Sequence[Daemon], drains: Sequence[Drain]) -> Sequence[Daemon]:
    """Those that are not drained. Where all are, each: what is resident may still train."""
    return [one for one in daemons if first_for(drains, one.name) is None] or daemons


def _speed(daemons: Sequence[Daemon]) -> float | None:
    return sum(one.detail.get("tokens_per_second", 0.0) for one in daemons) or None


def _service(base_hash: str, daemons: Sequence[Daemon], drains: Sequence[Drain], tried: Sequence[Any]) -> Service:
    """What the live daemons of a base can do.

    `tried`: (base_hash, status) of the jobs that are tried alone. One that waits keeps all daemons of its base from
    taking others in; one that trains keeps its own.
    """
    statuses = [one.status for one in tried if one.base_hash == base_hash]
    in_force = [drain for one in daemons if (drain := first_for(drains, one.name)) is not None]
    return Service(
        drain=OpenDrain(reason=in_force[0].reason) if len(in_force) == len(daemons) else None,
        is_disk_full=all(one.state == "disk_full" for one in daemons),
        is_trying=JobStatus.QUEUED in statuses or 0 < len(daemons) - len(in_force) <= len(statuses),
        is_starting=daemons[0].base_hash is None,
    )


def _num_places(daemons: Sequence[Daemon]) -> int:
    return sum(one.detail.get("max_resident_runs", 0) for one in daemons)


def _read_queues(
    reader: Reader, jobs: Sequence[Job], at_work: Mapping[str, Sequence[Daemon]], *, is_any_resident: bool
) -> dict[str, Queue]:
    """By base. `at_work`: the daemons of each."""
    wanted = {
        "base_hashes": list(at_work),
        "epochs": [one.epoch for daemons in at_work.values() for one in daemons],
        "tenant_ids": sorted({job.tenant_id for job in jobs}),
        "job_ids": [job.id for job in jobs],
        "places": max([MOST_ADDED, *map(_num_places, at_work.values())]),
    }
    tenants = rows(reader, _TENANTS, wanted) if is_any_resident else []
    queued = rows(reader, _JOBS, wanted)
    return {
        base_hash: _queue(
            daemons,
            [one for one in tenants if one.base_hash == base_hash],
            [one for one in queued if one.base_hash == base_hash],
        )
        for base_hash, daemons in at_work.items()
    }


def _queue(daemons: Sequence[Daemon], tenants: Sequence[Any], queued: Sequence[Any]) -> Queue:
    """`tenants`: those with a resident run. `queued`: the jobs."""
    jobs: dict[str, list[QueuedJob]] = defaultdict(list)
    for _base_hash, _share, tenant_id, _total, *job in queued:
        jobs[tenant_id].append(QueuedJob(*job))
    ending = [one for one in tenants if one.left is not None] if queued else []
    return Queue(
        tokens_per_second=_speed(daemons),
        free_places=max(0, _num_places(daemons) - sum(one.num_held for one in tenants)),
        shares={one.tenant_id: one.share / one.total_share for one in queued},
        ending=[EndingTenant(one.share / queued[0].total_share, one.left) for one in ending],
        jobs=jobs,
    )
