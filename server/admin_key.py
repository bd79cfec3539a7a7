"""The operator's key: from the settings, or a file of the data directory that the first start writes."""

import os
import secrets
from pathlib import Path

from server.data_dir import ensure_data_dir
from server.settings import Settings


def ensure_admin_key(settings: Settings) -> tuple[str, Path | None]:
    """(the key, the file if this call wrote it). The file is readable by its owner alone.

    Raises `data_dir_not_writable`. The file is linked into place complete, so that of two processes that start at
    once both end with the same key.
    """
    if settings.admin_key is not None:
        return settings.admin_key, None
    path = settings.data_dir / "admin.key"
    if path.exists():
        return path.read_text().strip(), None
    ensure_data_dir(settings)
    draft = path.with_name(f"admin.key.{os.getpid()}.tmp")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write("mxl_admin_" + secrets.token_urlsafe(32) + "\n")
    try:
        os.link(draft, path)
        return path.read_text().strip(), path
    except FileExistsError:
        return path.read_text().strip(), None
    finally:
        draft.unlink()
