"""The renderer of a base, loaded once for as long as what the daemon published stays the same."""

import json
from functools import lru_cache
from pathlib import Path

from server.api.services import Services
from server.db.tables import Base
from server.errors import MixloomError
from server.render import Renderer
from server.store import is_whole


def renderer_for(services: Services, base: Base) -> Renderer:
    """The renderer of a base. A daemon started with another chat template publishes the folder anew.

    Raises 503 `base_not_ready`: its files are not there, or not what was published.
    """
    folder = services.store.path(base.folder_key)
    try:
        return _load(folder, folder.stat().st_mtime_ns, json.dumps(base.manifest))
    except FileNotFoundError as error:
        raise _damaged() from error


@lru_cache(maxsize=4)
def _load(folder: Path, _published_at: int, manifest: str) -> Renderer:
    """`manifest`: as JSON; of a row of an older version null."""
    expected = json.loads(manifest)
    if expected is not None and not is_whole(folder, expected):
        raise _damaged()
    return Renderer(folder)


def _damaged() -> MixloomError:
    return MixloomError(
        "base_not_ready",
        "The base's tokenizer on the server's disk is not what was published. Tell the operator: a daemon writes it "
        "anew when it starts.",
        503,
        headers={"Retry-After": "60"},
    )
