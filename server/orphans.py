"""What lies in the store and no row names: left by somebody who was killed after the files and before the row."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

from sqlalchemy import text
from sqlalchemy.orm import Session

from server.db import adapters, bases, daemons, datasets, jobs, operations, recovery_points
from server.store import LocalStore

SAFE_SECONDS = 3600.0
"""Nobody takes so long from a folder's last file to its row."""
OF_DAEMON = ("adapters", "bases", "recovery")
"""Where the daemon alone writes; elsewhere the API does."""
PREFIXES = (*OF_DAEMON, "datasets", "exports", "jobs", "operations", "uploads")
_TABLES = ("adapters", "bases", "datasets", "jobs", "operations", "recovery_points", "runs")
"""Whose rows name folders."""

Read = Callable[[], AbstractContextManager[Session]]


def orphans(read: Read, store: LocalStore) -> list[str]:
    """Keys of folders without a row, unfinished ones among them, that have not changed for a safe time."""
    there = _there(store, PREFIXES)
    with read() as session:
        unnamed = _unnamed(session, there)
    return [key for key in unnamed if store.is_older(key, SAFE_SECONDS)]


def orphans_of_dead(read: Read, store: LocalStore) -> list[str]:
    """Those of daemons, however new, where one has just begun and no other lives: what they had not published."""
    there = _there(store, OF_DAEMON)
    with read() as session:
        return _unnamed(session, there) if len(daemons.live_daemons(session)) == 1 else []


def what_may_hide_rows(session: Session) -> list[str]:
    """What SQLite finds wrong with the tables that were asked, and their indexes: it may read them all the same."""
    if session.get_bind().dialect.name != "sqlite":
        return []
    said = (one for table in _TABLES for one in session.scalars(text(f"PRAGMA integrity_check({table})")))
    return [one for one in said if one != "ok"]


def _there(store: LocalStore, prefixes: Sequence[str]) -> dict[str, list[str]]:
    """The keys on the disk, which is asked before the rows are: so what comes meanwhile is no orphan.

    And no transaction waits for a slow disk.
    """
    there = {prefix: store.children(prefix) for prefix in prefixes}
    return there | {run: store.children(run) for run in there["recovery"]}


def _unnamed(session: Session, there: Mapping[str, Sequence[str]]) -> list[str]:
    named = _named_keys(session)
    return [key for prefix, keys in there.items() if prefix in named for key in keys if key not in named[prefix]]


def _named_keys(session: Session) -> dict[str, set[str]]:
    """The keys that rows name, by the prefix that they lie one level under."""
    of_adapters, points = adapters.all_keys(session), recovery_points.all_keys(session)
    runs = {f"recovery/{id_}" for id_ in recovery_points.all_runs(session)}
    return {
        "adapters": of_adapters,
        "uploads": of_adapters,
        "jobs": jobs.all_keys(session),
        "datasets": datasets.all_keys(session),
        "operations": operations.all_keys(session),
        "bases": bases.all_keys(session),
        "exports": set(),
        "recovery": runs,
        **dict.fromkeys(runs, points),
    }
