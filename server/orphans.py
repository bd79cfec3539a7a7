"""What lies in the store and no row names: left by somebody who was killed after the files and before the row."""

from sqlalchemy.orm import Session

from server.db import adapters, bases, datasets, jobs, operations, recovery_points
from server.store import LocalStore

SAFE_SECONDS = 3600.0
"""Nobody takes so long from a folder's last file to its row."""
OF_DAEMON = ("adapters", "bases", "recovery")
"""Where the daemon alone writes; elsewhere the API does."""


def named_keys(session: Session, store: LocalStore) -> dict[str, set[str]]:
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
        "recovery": runs,
        **dict.fromkeys(runs.intersection(store.list("recovery")), points),
    }


def orphans(session: Session, store: LocalStore, *, of_daemon_seconds: float = SAFE_SECONDS) -> list[str]:
    """Keys of folders without a row, unfinished ones among them, that have not changed for a safe time.

    `of_daemon_seconds`: that time for what a daemon writes. One that has just begun knows that no other lives.
    """
    return [
        key
        for prefix, named in named_keys(session, store).items()
        for key in store.unnamed(
            prefix, named, seconds=of_daemon_seconds if prefix.startswith(OF_DAEMON) else SAFE_SECONDS
        )
    ]
