"""An adapter's files as one zip: uncompressed, sorted, without times: the same bytes for the same adapter."""

import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

from fastapi import Query
from fastapi.responses import StreamingResponse

from server import children
from server.adapter_files import WEIGHTS
from server.api.answers import loads_in
from server.api.services import Services
from server.db.tables import Adapter
from server.errors import MixloomError

ArchiveFormat = Annotated[
    Literal["native", "peft", "mixlora"],
    Query(description="native: as trained. peft: for HF PEFT. mixlora: for the package of that name."),
]

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can say
_UNIX = 3
_MODE = 0o100644 << 16
_CHUNK_BYTES = 2**18
EXPORT_SECONDS = 600


def archive_response(services: Services, adapter: Adapter, format: str) -> StreamingResponse:
    """The answer that streams an adapter's zip. Raises `format_does_not_fit`."""
    if format != "native" and format not in loads_in(adapter.config):
        programs = " and ".join(loads_in(adapter.config))
        raise MixloomError(
            "format_does_not_fit",
            f"This adapter loads in {programs}, not in {format}. Take another format.",
            422,
            "format",
        )
    source = services.store.path(adapter.key)
    file = tempfile.TemporaryFile(dir=services.store.root)  # noqa: SIM115 (nameless; `_chunks` closes it)
    if format == "native" or (format == "peft" and adapter.method == "lora"):  # which is native to us
        write_zip(source, file)
    else:
        exports = services.store.path("exports")
        exports.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=exports) as folder:
            _export(source, Path(folder), format)
            write_zip(Path(folder), file)
    length = file.tell()
    file.seek(0)
    return StreamingResponse(
        _chunks(file),
        media_type="application/zip",
        headers={
            "Content-Length": str(length),
            "Content-Disposition": f'attachment; filename="{adapter.id}-{format}.zip"',
        },
    )


def write_zip(folder: Path, file: BinaryIO) -> None:
    """The files of a folder, in the order of their names, with nothing of this machine or moment."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.iterdir()):
            entry = zipfile.ZipInfo(path.name, _EPOCH)
            entry.create_system = _UNIX
            entry.external_attr = _MODE
            entry.file_size = path.stat().st_size
            with path.open("rb") as source, archive.open(entry, "w") as target:
                shutil.copyfileobj(source, target, _CHUNK_BYTES)


def _export(source: Path, target: Path, format: str) -> None:
    """Write an adapter in another layout, in a process of its own, since that takes torch."""
    weights = source / WEIGHTS
    weights.stat()  # of what is not there that process would have a traceback to tell
    done = subprocess.run(
        children.command("server.daemon.export", str(source), str(target), format),
        env=children.environment(),
        capture_output=True,
        text=True,
        timeout=EXPORT_SECONDS,
        check=False,
    )
    if done.returncode == 1 and "Traceback" not in done.stderr:
        raise MixloomError("format_does_not_fit", done.stderr.strip().splitlines()[-1], 422, "format")
    if done.returncode != 0:
        weights.stat()  # or has been deleted meanwhile
        raise RuntimeError(f"the export ended with {done.returncode}: {done.stderr}")


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk
