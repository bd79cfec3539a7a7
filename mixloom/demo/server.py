"""The demo's server: the real one, as a child process over a fresh data directory."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mixloom.cli.server import server_command, server_environment
from mixloom.client import Client
from mixloom.errors import ServerUnreachable

STOP_SECONDS = 45.0  # the server itself takes at most 30 to save what is in training
POLL_SECONDS = 0.5
MARK = "made-by-mixloom-demo"
"""A file in the data directory, with the server's process id; the demo removes no directory without it."""


class DemoFailed(Exception):
    """The demo cannot go on; the message is for the person who watches."""


@dataclass(frozen=True)
class DemoServer:
    """A running server, and the operator's key to it."""

    url: str
    admin_key: str
    data: Path
    log: Path
    process: subprocess.Popen[bytes]

    def wait_until_ready(self, say: Callable[[str], None]) -> None:
        """Return when jobs can train. Raises `DemoFailed` when the server has ended instead."""
        client, started = Client(self.url, self.admin_key), time.monotonic()
        while True:
            if self.process.poll() is not None:
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
                raise DemoFailed(f"The server ended (exit code {self.process.returncode}); {self.log} ends so:\n{tail}")
            try:
                ready = client.ready()
                if ready["status"] == "ready":
                    return
                reasons = " ".join(ready["reasons"])
            except ServerUnreachable:
                reasons = "The API is starting."
            seconds = time.monotonic() - started
            say(f"{reasons} ({seconds:.0f} s; the first start of all converts the base model)")
            time.sleep(POLL_SECONDS)


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[DemoServer]:
    """A server over `folder`/data, stopped at the end whatever happens. `flags` are more settings.

    Its tables are there too: what MIXLOOM_DATABASE_URL names is an operator's, and of another data directory.
    """
    data = _fresh_data(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    admin_key = "mxl_admin_" + secrets.token_urlsafe(32)
    log = folder / "server.log"
    settings = {name: value for name, value in server_environment().items() if name != "MIXLOOM_DATABASE_URL"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            server_command("serve", "--data-dir", str(data), "--host", "127.0.0.1", "--port", str(port), *flags),
            env={**settings, "MIXLOOM_ADMIN_KEY": admin_key},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the demo, which then stops the server in order
        )
    (data / MARK).write_text(str(process.pid))
    try:
        with _signals_as_ctrl_c():
            yield DemoServer(f"http://127.0.0.1:{port}", admin_key, data, log, process)
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _fresh_data(folder: Path) -> Path:
    """An empty data directory; one of an earlier demo is removed, anything else is left alone."""
    data = folder.resolve() / "data"
    mark = data / MARK
    if data.exists():
        if not mark.exists():
            raise DemoFailed(f"{data} was not made by a demo, so it stays as it is. Choose another --dir.")
        pid = int(mark.read_text() or 0)
        if pid and _is_alive(pid):
            raise DemoFailed(f"Another demo's server (process {pid}) works in {data}. Stop it or choose another --dir.")
        shutil.rmtree(data)
    data.mkdir(parents=True)
    mark.touch()
    return data


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def _signals_as_ctrl_c() -> Iterator[None]:
    """SIGTERM, and a terminal that is closed, end the demo as Ctrl-C does: the server is stopped too."""
    handled = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.default_int_handler) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
