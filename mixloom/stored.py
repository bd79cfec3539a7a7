"""What this machine remembers between two commands: the login, and the last job sent to each server."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_config_path

DEFAULT_URL = "http://127.0.0.1:8000"


@dataclass(frozen=True)
class Login:
    """A server, and the key to use there."""

    url: str
    api_key: str | None


def _path(name: str) -> Path:
    return user_config_path("mixloom") / name


def _write(path: Path, value: dict[str, str]) -> None:
    """The file is its owner's alone from its first byte on."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(value, file)
    draft.replace(path)


def _read(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    value: dict[str, str] = json.loads(path.read_text())
    return value


def save_login(url: str, api_key: str) -> Path:
    """Remember a server and a key; the path of the file (mode 0600)."""
    path = _path("login.json")
    _write(path, {"url": url.rstrip("/"), "api_key": api_key})
    return path


def current_login(url: str | None = None) -> Login:
    """From the argument, then MIXLOOM_URL and MIXLOOM_API_KEY, then the stored login.

    A stored key goes to its own server only.
    """
    stored = _read(_path("login.json"))
    chosen = (url or os.environ.get("MIXLOOM_URL") or stored.get("url") or DEFAULT_URL).rstrip("/")
    stored_key = stored.get("api_key") if stored.get("url") == chosen else None
    return Login(chosen, os.environ.get("MIXLOOM_API_KEY") or stored_key)


def remember_last_job(url: str, job_id: str) -> None:
    """What `@last` means from now on, on this server."""
    _write(_path("last.json"), {**_read(_path("last.json")), url: job_id})


def last_job(url: str) -> str | None:
    """The id of the job that this machine submitted last to this server."""
    return _read(_path("last.json")).get(url)
