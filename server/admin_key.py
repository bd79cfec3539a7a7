"""The operator's key: from the settings, or a file of the data directory that the first start writes."""

import os
import secrets
from pathlib import Path

from server.data_dir import ensure_data_dir
from server.settings import Settings
from server.store import LocalStore


def ensure_admin_key(settings: Settings) -> tuple[str, Path | None]:
    """(the key, the file if this call wrote it). The file is readable by its owner alone.

    Raises `data_dir_not_writable`. The file gets its name complete, so that of two processes that start at once both
    end with the same key. Drafts that a kill has left go once there is a key; a start whose draft went takes that key.
    """
    if settings.admin_key is not None:
        return settings.admin_key, None
    path = settings.data_dir / "admin.key"
    is_new = not path.exists() and _write(settings, path)
    for draft in settings.data_dir.glob(f"{path.name}.*.tmp"):
        draft.unlink(missing_ok=True)
    return path.read_text().strip(), path if is_new else None


def _write(settings: Settings, path: Path) -> bool:
    """Whether nobody else was faster."""
    ensure_data_dir(settings)
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write("mxl_admin_" + secrets.token_urlsafe(32) + "\n")
        LocalStore(settings.data_dir).publish_new_file(draft, path.name)
    except (FileExistsError, FileNotFoundError):
        return False
    finally:
        draft.unlink(missing_ok=True)
    return True
