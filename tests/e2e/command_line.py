"""`mixloom …` as a person types it, in a process of its own."""

import subprocess
from pathlib import Path

from server import children
from tests.e2e.server import Server, environment


def mixloom(server: Server, key: str, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command that speaks to `server` with `key`, run in `folder`; its home is the server's folder."""
    home = server.folder / "home"
    home.mkdir(exist_ok=True)
    return subprocess.run(
        children.command("mixloom", *arguments),
        env={
            **environment(),
            "HOME": str(home),
            "XDG_CONFIG_HOME": str(home / ".config"),
            "MIXLOOM_URL": server.url,
            "MIXLOOM_API_KEY": key,
        },
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
