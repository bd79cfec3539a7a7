"""HTTP as all the nouns need it: keys, errors, retries of reads, pages, downloads. Knows no noun."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from mixloom.errors import ServerUnreachable, error_of

Object = dict[str, Any]
"""A JSON object of the API, as it came."""
Objects = list[Object]

CONNECT_SECONDS = 5.0
PAGE = 100  # objects in a page, the most that the API gives
RETRY_SECONDS = (0.2, 0.8)
"""Pauses before a read is tried again on a broken connection. A write may have arrived: only one with a key is."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def given(**values: Any) -> Object:
    """Those of the values that somebody gave: what is None is left to the server."""
    return {name: value for name, value in values.items() if value is not None}


class Transport:
    """One server, one key. Threads may share it."""

    def __init__(self, url: str, api_key: str | None, timeout: float):
        self.url = url.rstrip("/")
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(timeout, connect=CONNECT_SECONDS),
            trust_env=httpx.URL(self.url).host not in LOOPBACK,  # a proxy cannot reach this machine's loopback
        )

    def get(self, path: str, params: Object | None = None, *, answers: tuple[int, ...] = ()) -> Any:
        """The JSON of a read. `answers` are statuses of 400 and above that are no failure here."""
        return self._again("GET", path, answers, params=params).json()

    def post(self, path: str, body: Object | None = None) -> Any:
        """The JSON of a write. `body` None: no body at all."""
        return self._send("POST", path, json=body).json()

    def post_once(self, path: str, body: Object, key: str) -> Any:
        """The JSON of a write that the server carries out once, however often it comes with this key."""
        return self._again("POST", path, json=body, headers={"Idempotency-Key": key}).json()

    def patch(self, path: str, body: Object) -> Any:
        return self._send("PATCH", path, json=body).json()

    def delete(self, path: str) -> Any:
        return self._send("DELETE", path).json()

    def upload(self, path: str, files: dict[str, tuple[str, Any]], fields: dict[str, str]) -> Any:
        """A multipart POST: each part's file name and content (bytes or an open file), beside the text fields."""
        return self._send("POST", path, files=files, data=fields).json()

    def pages(self, path: str, *, limit: int | None = None, **filters: Any) -> Iterator[Object]:
        """The objects of a list, newest first unless `order="asc"`, over as many pages as it takes."""
        params = given(**filters)
        while limit is None or limit > 0:
            page = self.get(path, {**params, "limit": PAGE if limit is None else min(limit, PAGE)})
            yield from page["data"]
            if not page["has_more"]:
                return
            params["after"] = page["last_id"]
            limit = None if limit is None else limit - len(page["data"])

    def download(self, path: str, target: Path, params: Object | None = None) -> Path:
        """A file, whole or not at all: it is written beside its place and then moved there."""
        draft = target.with_name(target.name + ".part")
        try:
            with self._http.stream("GET", path, params=params) as response:
                if response.is_error:
                    response.read()
                    raise error_of(response)
                target.parent.mkdir(parents=True, exist_ok=True)
                with draft.open("wb") as file:
                    for chunk in response.iter_bytes():
                        file.write(chunk)
            return draft.replace(target)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        finally:
            draft.unlink(missing_ok=True)

    def close(self) -> None:
        self._http.close()

    def _again(self, method: str, path: str, answers: tuple[int, ...] = (), **parts: Any) -> httpx.Response:
        for pause in RETRY_SECONDS:
            try:
                return self._send(method, path, answers, **parts)
            except ServerUnreachable:
                time.sleep(pause)
        return self._send(method, path, answers, **parts)

    def _send(self, method: str, path: str, answers: tuple[int, ...] = (), **parts: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **parts)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if response.is_error and response.status_code not in answers:
            raise error_of(response)
        return response

    def _unreachable(self, error: httpx.TransportError) -> ServerUnreachable:
        return ServerUnreachable(
            f"No Mixloom server answers at {self.url} ({error or type(error).__name__}). Start one with "
            "`mixloom serve`, or name another with `mixloom login URL`.",
            code="server_unreachable",
        )
