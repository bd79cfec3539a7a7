"""The renderer of a base, loaded once for as long as what the daemon published stays the same."""

from functools import lru_cache
from pathlib import Path

from server.api.services import Services
from server.db.tables import Base
from server.render import Renderer


def renderer_for(services: Services, base: Base) -> Renderer:
    """The renderer of a base. A daemon started with another chat template publishes the folder anew."""
    folder = services.store.path(base.folder_key)
    return _load(folder, folder.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _load(folder: Path, _published_at: int) -> Renderer:
    return Renderer(folder)
