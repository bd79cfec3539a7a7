"""Seats: each open life of a daemon has one, by whose number it knows its counters of the tenants.

So each daemon is a fair queue of its own. A life that is over frees its seat, and who begins takes the smallest that is
free: a daemon that starts again goes on with the counters that it left. On SQLite, with one daemon, it is always 1.
"""

from itertools import chain, count

from sqlalchemy import bindparam, exists, insert, select
from sqlalchemy.orm import Session

from server.db.session import one_at_a_time
from server.db.tables import Counter, Daemon, Tenant

_COUNTERS, _TENANTS = (Tenant.metadata.tables[name] for name in ("counters", "tenants"))
_TAKEN = select(Daemon.seat).where(Daemon.ended_at.is_(None)).distinct()
_SEAT = bindparam("of_seat", type_=_COUNTERS.c.seat.type)
_HAS_ONE = exists().where(_COUNTERS.c.tenant_id == _TENANTS.c.id, _COUNTERS.c.seat == _SEAT)
_ADD = insert(_COUNTERS).from_select(["tenant_id", "seat"], select(_TENANTS.c.id, _SEAT).where(~_HAS_ONE))


def take(session: Session, before: int | None) -> int:
    """The seat of the life `before`, or else the smallest that no open life has; from now on each tenant has a counter
    there.

    Who takes one, or adds a tenant, waits until this transaction ends.
    """
    one_at_a_time(session, "seats")
    taken = set(session.scalars(_TAKEN))
    last = session.scalar(select(Daemon.seat).where(Daemon.epoch == before))
    seat = next(number for number in chain([last], count(1)) if number is not None and number not in taken)
    session.execute(_ADD, {"of_seat": seat})
    return seat


def add_counters(session: Session, tenant_id: str) -> None:
    """Of a new tenant, for the seats that are taken."""
    one_at_a_time(session, "seats")
    session.add_all(Counter(tenant_id=tenant_id, seat=seat) for seat in session.scalars(_TAKEN))


def floor(session: Session, seat: int) -> float:
    """The last smallest counter of a tenant with work, as the last life on this seat has seen it."""
    last = select(Daemon.floor).where(Daemon.seat == seat).order_by(Daemon.epoch.desc()).limit(1)
    return session.scalar(last) or 0.0
