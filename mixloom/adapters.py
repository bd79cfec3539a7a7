"""Adapters, as `client.adapters`."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from mixloom.transport import Object, Objects, Transport, given

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""The second is a pickle, which the server refuses, saying how to convert it."""


class Adapters:
    """The weights that jobs have made or that you send: upload, look, download, delete."""

    def __init__(self, transport: Transport):
        self._transport = transport

    def upload(self, folder: str | Path, *, name: str | None = None) -> Object:
        """The adapter made of a folder that HF PEFT (LoRA, DoRA) or the package mixlora saved.

        `name`: default the folder's. Its `warnings` say what to look at.
        """
        folder = Path(folder).resolve()
        weights = next((path for path in (folder / one for one in WEIGHTS) if path.exists()), folder / WEIGHTS[0])
        with ExitStack() as stack:
            parts = {"config": folder / CONFIG, "weights": weights}
            files = {part: (path.name, stack.enter_context(path.open("rb"))) for part, path in parts.items()}
            return self._transport.upload("/adapters", files, {"name": name or folder.name or "upload"})

    def iterate(self, *, name: str | None = None, order: str = "desc") -> Iterator[Object]:
        """Every adapter of yours, page after page."""
        return self._transport.pages("/adapters", name=name, order=order)

    def list(self, limit: int = 20, *, name: str | None = None) -> Objects:
        """Your newest adapters."""
        return list(self._transport.pages("/adapters", limit=limit, name=name))

    def get(self, adapter: str) -> Object:
        return self._transport.get(f"/adapters/{adapter}")

    def delete(self, adapter: str) -> Object:
        return self._transport.delete(f"/adapters/{adapter}")

    def files(self, adapter: str) -> Objects:
        """Its files: name, bytes, sha256."""
        return self._transport.get(f"/adapters/{adapter}/files")["data"]

    def download_file(self, adapter: str, name: str, path: str | Path | None = None) -> Path:
        """Save one of its files."""
        return self._transport.download(f"/adapters/{adapter}/files/{name}", Path(path or name))

    def download(self, adapter: str, path: str | Path | None = None, *, format: str | None = None) -> Path:
        """Save all of it as a zip: `format` native, peft or mixlora."""
        return save_archive(self._transport, f"/adapters/{adapter}/archive", adapter, path, {"format": format})


def save_archive(
    transport: Transport, route: str, id_: str, path: str | Path | None, choices: dict[str, str | int | None]
) -> Path:
    """The zip of `route` at `path`: a file, or a folder (default: this one) that then holds `ID.zip`."""
    target = Path(path or ".")
    if target.is_dir():
        target = target / f"{id_}.zip"
    return transport.download(route, target, given(**choices))
