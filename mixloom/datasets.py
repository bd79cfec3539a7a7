"""Data sets, as `client.datasets`."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from mixloom.transport import Object, Objects, Transport, given


class Datasets:
    """Upload rows, look at them, delete them."""

    def __init__(self, transport: Transport):
        self._transport = transport

    def upload(
        self,
        rows: str | Path | Iterable[Object],
        *,
        name: str | None = None,
        columns: dict[str, str] | None = None,
    ) -> Object:
        """The data set made of a file (JSONL, CSV, Parquet) or of rows given as dicts.

        `columns` says where the server finds what it needs: `{"prompt": "question", "completion": "answer"}`.
        """
        fields = {"name": name} if name else {}
        if columns:
            fields["columns"] = json.dumps(columns)
        if isinstance(rows, str | Path):
            with Path(rows).open("rb") as file:
                return self._transport.upload("/datasets", {"file": (Path(rows).name, file)}, fields)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        return self._transport.upload("/datasets", {"file": ("rows.jsonl", lines.encode())}, fields)

    def from_hub(
        self,
        hub: str,
        *,
        config: str | None = None,
        split: str | None = None,
        revision: str | None = None,
        columns: dict[str, str] | None = None,
    ) -> Object:
        """The data set made of one on the hub (`"org/name"`); the server fetches it."""
        asked = given(hub=hub, config=config, split=split, revision=revision, columns=columns)
        return self._transport.post("/datasets", asked)

    def iterate(self, *, name: str | None = None, order: str = "desc") -> Iterator[Object]:
        """Every data set of yours, page after page."""
        return self._transport.pages("/datasets", name=name, order=order)

    def list(self, limit: int = 20, *, name: str | None = None) -> Objects:
        """Your newest data sets."""
        return list(self._transport.pages("/datasets", limit=limit, name=name))

    def get(self, dataset_id: str) -> Object:
        return self._transport.get(f"/datasets/{dataset_id}")

    def rows(self, dataset_id: str, limit: int = 20) -> Objects:
        """Its first rows: `{"id": number, "row": …, "tokens": how many}`."""
        return list(self._transport.pages(f"/datasets/{dataset_id}/rows", limit=limit))

    def content(self, dataset_id: str, path: str | Path) -> Path:
        """Save the file as it was uploaded."""
        return self._transport.download(f"/datasets/{dataset_id}/content", Path(path))

    def delete(self, dataset_id: str) -> Object:
        """Jobs that were submitted with it keep their tokens."""
        return self._transport.delete(f"/datasets/{dataset_id}")
