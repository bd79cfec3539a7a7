"""The real server as processes, on a data directory that outlives them: started, killed, looked into."""

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy.exc import DBAPIError

from benchmarks.processes import Tables
from mixloom import Client, MixloomError
from server import children, faults

ADMIN_KEY = "an-admin-key-of-more-than-32-characters"
START_SECONDS = 300.0
"""Ten on a machine that does nothing else; 160 were seen beside eight busy processes on two cores."""
END_SECONDS = START_SECONDS + 120.0
"""For jobs to end: on the way the daemon may have to start anew."""
STOP_SECONDS = 60.0
POLL_SECONDS = 0.02
START_POLL_SECONDS = 0.1  # to look costs processor time, which whoever starts has need of
DEFAULTS = {"dtype": "float32", "threads": 1, "recovery_steps": 5, "microbatch_tokens": 256, "token_budget": 1024}


def environment() -> dict[str, str]:
    """This process's, without settings of Mixloom that the machine may have."""
    ours = {name: value for name, value in children.environment().items() if not name.startswith("MIXLOOM_")}
    return {**ours, "OMP_WAIT_POLICY": "passive", "MIXLOOM_ADMIN_KEY": ADMIN_KEY}


def free_port() -> int:
    """One below those that the kernel gives to whoever asks, so that it stays free while its server is down."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with socket.socket() as probe, suppress(OSError):  # it is somebody else's
            probe.bind(("127.0.0.1", port))
            return port


def wait_for(
    condition: Callable[[], Any], seconds: float = 60.0, *, every: float = POLL_SECONDS, why: Callable[[], str] = str
) -> Any:
    """What `condition` returns, once that is true. `why` says more when it never is."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds} s {why()}"
        time.sleep(every)
    return value


class Server:
    """`mixloom serve` on `folder`/data. The same port and the same keys at every start."""

    def __init__(self, folder: Path, base: Path | str, **settings: Any):
        self.folder = folder
        self.base = base
        self.settings = {**DEFAULTS, **settings}
        self.rows = Tables(self.data, settings.get("database_url")).rows
        self.faults = folder / "faults"  # what `server.faults.arm` writes for it
        self.environment = {**environment(), faults.VARIABLE: str(self.faults)}
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.admin = Client(f"http://127.0.0.1:{self.port}", ADMIN_KEY)
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._tenants: dict[str, Client] = {}
        self._keys: dict[str, str] = {}

    @property
    def url(self) -> str:
        return self.admin.url

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def log(self) -> str:
        """What all lives of it have written."""
        return (self.folder / "server.log").read_text(errors="replace")

    def spawn(self, verb: str = "serve") -> subprocess.Popen[bytes]:
        """Start the processes, or the API alone, and do not wait for them."""
        self.process = self._spawn(verb)
        return self.process

    def spawn_daemon(self) -> "subprocess.Popen[bytes]":
        """Start an engine daemon more, which nobody supervises; `end` ends it."""
        self._daemons.append(self._spawn("daemon"))
        return self._daemons[-1]

    def _spawn(self, verb: str) -> "subprocess.Popen[bytes]":
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = {"data_dir": self.data, "base": self.base, "port": self.port, **self.settings}
        flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        with (self.folder / "server.log").open("ab") as log:
            return subprocess.Popen(
                children.command("server", verb, *flags),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start(self) -> "Server":
        """Start it if it does not run, and return when it trains."""
        if self.process is None or self.process.poll() is not None:
            self.spawn()
        self.wait_until_ready()
        return self

    def wait_until_ready(self) -> None:
        """Return when a daemon of this life is ready; the row of a dead one does not count."""
        wait_for(self._is_ready, START_SECONDS, every=START_POLL_SECONDS, why=lambda: self.log[-3000:])

    def _is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"the server ended: {self.log[-3000:]}"
        daemon = self.newest_daemon()
        if daemon is None or daemon["pid"] != self.daemon_pid or daemon["state"] not in ("ready", "drained"):
            return False
        try:
            return bool(self.admin.ready()["status"] == "ready")
        except MixloomError:
            return False

    @property
    def daemon_pid(self) -> int | None:
        """The engine daemon's process, if there is one."""
        assert self.process is not None
        try:
            children_ = psutil.Process(self.process.pid).children()
            return next((child.pid for child in children_ if "daemon" in child.cmdline()), None)
        except psutil.NoSuchProcess:
            return None

    def stop(self) -> int:
        """SIGTERM, as an operator would; the exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(STOP_SECONDS)

    def kill(self, *whom: str) -> None:
        """kill -9 of "api", "daemon" or both. Without the API the daemon ends by itself; this waits for that."""
        assert self.process is not None
        pids = {"api": self.process.pid, "daemon": wait_for(lambda: self.daemon_pid)}
        for name in whom:
            os.kill(pids[name], signal.SIGKILL)
        if "api" in whom:
            self.process.wait(STOP_SECONDS)
            wait_for(lambda: is_gone(pids["daemon"]) or is_stopped(pids["daemon"]))
        else:
            wait_for(lambda: is_gone(pids["daemon"]))

    def end(self) -> None:
        """Leave no process behind, whatever state they are in."""
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()
        if self.process is None:
            return
        pid = self.daemon_pid
        for one in filter(None, (self.process.pid if self.process.poll() is None else None, pid)):
            os.kill(one, signal.SIGKILL)
        self.process.wait()

    def tenant(self, name: str) -> Client:
        """The client of a tenant, made at the first call."""
        if name not in self._tenants:
            self._keys[name] = self.admin.admin.create_tenant(name)["key"]
            self._tenants[name] = Client(self.url, self._keys[name])
        return self._tenants[name]

    def key(self, name: str) -> str:
        """The key of a tenant that was made by `tenant`."""
        return self._keys[name]

    def newest_daemon(self) -> dict[str, Any] | None:
        """The row of the last daemon that started."""
        try:
            rows = self.rows("SELECT * FROM daemons ORDER BY epoch DESC LIMIT 1")
        except DBAPIError:  # the first start has not made the tables yet
            return None
        return rows[0] if rows else None

    def num_gangs(self) -> int:
        """How many gangs the daemon that is alive has done; 0 while there is none."""
        daemon = self.newest_daemon()
        if daemon is None or daemon["pid"] != self.daemon_pid:
            return 0
        return int(json.loads(daemon["detail"]).get("gangs", 0))

    def status(self, job_id: str) -> str:
        """A job's status in the database."""
        return str(self.rows("SELECT status FROM jobs WHERE id = ?", job_id)[0]["status"])

    def step(self, job_id: str) -> int:
        """A job's last recorded step."""
        return int(self.rows("SELECT step FROM jobs WHERE id = ?", job_id)[0]["step"])

    def metric_steps(self, job_id: str) -> list[int]:
        """The steps that have metrics, in order; one that was there twice would be listed twice."""
        return [row["step"] for row in self.rows("SELECT step FROM metrics WHERE job_id = ? ORDER BY step", job_id)]

    def hash(self, job_id: str) -> str:
        """sha256 of the final adapter of a job that has succeeded, as the database and the file have it."""
        job = self.rows("SELECT status, error, adapter_id FROM jobs WHERE id = ?", job_id)[0]
        assert job["status"] == "succeeded", job
        adapter = self.rows("SELECT sha256, key FROM adapters WHERE id = ?", job["adapter_id"])[0]
        file = self.data / adapter["key"] / "adapter_model.safetensors"
        assert hashlib.sha256(file.read_bytes()).hexdigest() == adapter["sha256"]
        return str(adapter["sha256"])

    def finish(self, *job_ids: str, seconds: float = END_SECONDS) -> list[str]:
        """Wait until the jobs have ended; their final hashes."""
        ended = ("succeeded", "failed", "cancelled")
        wait_for(
            lambda: all(self.status(id_) in ended for id_ in job_ids),
            seconds,
            why=lambda: f"{[(self.status(id_), self.step(id_)) for id_ in job_ids]} {self.log[-2000:]}",
        )
        return [self.hash(id_) for id_ in job_ids]


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has buried counts as ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def is_stopped(pid: int) -> bool:
    """Whether SIGSTOP holds it."""
    return not is_gone(pid) and psutil.Process(pid).status() == psutil.STATUS_STOPPED
