"""The data directory, before anything is kept in it."""

import os

from server.errors import MixloomError
from server.settings import Settings

DAEMON_LOCK = "daemon.lock"
"""A file that the daemon on a SQLite database holds as long as it lives."""


def ensure_data_dir(settings: Settings) -> None:
    """Make the data directory if it is not there. Raises `data_dir_not_writable`."""
    reason = "permission denied"
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        if os.access(settings.data_dir, os.W_OK | os.X_OK):
            return
    except OSError as error:
        reason = error.strerror or str(error)
    raise MixloomError(
        "data_dir_not_writable",
        f"The data directory {settings.data_dir} cannot be written ({reason}). Set MIXLOOM_DATA_DIR to one that can, "
        "or change its permissions.",
        500,
    )
