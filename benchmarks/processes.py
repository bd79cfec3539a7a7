"""A server's processes, on a data directory that outlives them: started, killed, looked into."""

import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import NullPool, create_engine, make_url
from sqlalchemy.exc import DBAPIError

from benchmarks.errors import BenchmarkError
from mixloom.client import Client
from mixloom.errors import MixloomError
from server import children
from server.db.session import Database
from server.orphans import orphans
from server.settings import Settings
from server.store import LocalStore

POLL_SECONDS = 0.02
WAIT_SECONDS = 600.0
"""A daemon gives way to all else: beside busy programs a start took four minutes that takes ten seconds."""


def let_an_hour_pass(data: Path, database_url: str | None = None) -> None:
    """For all files: what no row names goes, as a daemon erases it that has lived for an hour.

    Whoever could be about to name any of it is dead, or stopped.
    """
    for path in data.glob("*/**/*"):
        os.utime(path, (0, 0))
    database = Database(Settings(data_dir=data, database_url=database_url).database)
    store = LocalStore(data)
    for key in orphans(database.read, store):
        store.delete(key)
    database.close()


_COMPACT = {
    "sqlite": ("VACUUM", "SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()"),
    "postgresql": ("VACUUM FULL", "SELECT pg_database_size(current_database())"),
}
"""How a database gives back room, and how much it takes; on PostgreSQL with its catalogs, some 7 MiB."""


class Tables:
    """A server's database, by statements of one's own: SQLite's in a data directory, or PostgreSQL's."""

    def __init__(self, data: Path, database_url: str | None = None):
        if database_url is None:  # only if the file is there: else to look would make one
            url, options = make_url(f"sqlite:///file:{data / 'mixloom.db'}?mode=rw&uri=true"), {"timeout": 30}
        else:
            url, options = make_url(database_url).set(drivername="postgresql+psycopg"), {}
        self._engine = create_engine(url, poolclass=NullPool, connect_args=options, json_deserializer=bytes.decode)

    def rows(self, statement: str, *values: Any) -> list[dict[str, Any]]:
        """What a statement returns, in which `?` stands for each value; JSON is text, as it is kept.

        Raises `DBAPIError` until there are tables.
        """
        if self._engine.dialect.name == "postgresql":
            statement = statement.replace("%", "%%").replace("?", "%s")
        with self._engine.begin() as connection:
            found = connection.exec_driver_sql(statement, values or None)
            return [dict(row) for row in found.mappings()] if found.returns_rows else []

    def compact_bytes(self) -> int:
        """What the database takes once it has given back what nobody uses, as an operator would have it do."""
        vacuum, size = _COMPACT[self._engine.dialect.name]
        with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(vacuum)
            return int(connection.exec_driver_sql(size).scalar_one())


class Processes:
    """`mixloom serve` on `folder`/data: the same port and the same operator's key at every start."""

    def __init__(self, folder: Path, base: Path, **settings: Any):
        self.data = folder / "data"
        self.database_url: str | None = settings.get("database_url")
        self.tables = Tables(self.data, self.database_url)
        self.rows = self.tables.rows
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        settings = {"data_dir": self.data, "base": base, "port": port, **settings}
        self._flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        self._key = secrets.token_urlsafe(32)
        self._log = folder / "server.log"
        self.operator = Client(f"http://127.0.0.1:{port}", self._key)
        self.api: subprocess.Popen[bytes] | None = None
        self._stopped: list[psutil.Process] = []

    def spawn(self) -> None:
        """Start them, and do not wait."""
        ours = {name: value for name, value in children.environment().items() if not name.startswith("MIXLOOM_")}
        with self._log.open("ab") as log:
            self.api = subprocess.Popen(
                children.command("server", "serve", *self._flags),
                env={**ours, "MIXLOOM_ADMIN_KEY": self._key},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        return self.operator.url

    @property
    def daemon(self) -> psutil.Process | None:
        """The engine daemon, if there is one."""
        assert self.api is not None
        try:
            ours = psutil.Process(self.api.pid).children()
            return next((child for child in ours if "daemon" in child.cmdline()), None)
        except psutil.Error:
            return None

    def is_ready(self) -> bool:
        """Whether a daemon of this life trains; the row of a dead one does not count."""
        assert self.api is not None
        if self.api.poll() is not None:
            raise BenchmarkError(f"The server has ended. {self.log_tail()}")
        daemon = self.daemon
        if daemon is None:
            return False
        try:
            newest = self.rows("SELECT pid, state FROM daemons ORDER BY epoch DESC LIMIT 1")
            is_ours = newest == [{"pid": daemon.pid, "state": "ready"}]
            return is_ours and self.operator.ready()["status"] == "ready"
        except (MixloomError, DBAPIError):  # it starts
            return False

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = WAIT_SECONDS) -> Any:
        """What `condition` returns, once that is true. Raises `BenchmarkError` when it is not in time."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            if time.monotonic() > end:
                raise BenchmarkError(f"{what}: not within {seconds:.0f} s. {self.log_tail()}")
            time.sleep(POLL_SECONDS)
        return value

    def log_tail(self) -> str:
        return f"Its log ends so:\n{self._log.read_text(errors='replace')[-3000:]}"

    def stop(self, process: psutil.Process) -> None:
        """SIGSTOP. One that does not hold the lock yet nobody ends until `end` does."""
        self._stopped.append(process)
        with_signal(process, signal.SIGSTOP)

    def end(self) -> None:
        """Leave no process behind, whatever state they are in."""
        if self.api is None:
            return
        left = [*self._stopped, self.daemon]
        self.api.kill()
        self.api.wait()
        for process in left:
            if process is not None and process.is_running():  # not one that has its number by now
                with_signal(process, signal.SIGKILL)


@contextmanager
def running(folder: Path, base: Path, **settings: Any) -> Iterator[Processes]:
    """A server that trains; it is gone at the end, whatever happens."""
    server = Processes(folder, base, **settings)
    try:
        server.spawn()
        server.wait(server.is_ready, "The server was to train")
        yield server
    finally:
        server.end()


def with_signal(process: psutil.Process, number: int) -> None:
    """Send a signal; a process that has just ended needs none."""
    try:
        os.kill(process.pid, number)
    except ProcessLookupError:
        return
