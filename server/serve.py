"""`mixloom serve`: the API process and, as a supervised child, the engine daemon."""

import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn
from sqlalchemy.exc import SQLAlchemyError

from server import children, garbage
from server.api.app import create_app
from server.db import drains, leases
from server.db.session import Database
from server.errors import MixloomError
from server.ids import new_id
from server.logs import configure_logging
from server.settings import Settings

log = logging.getLogger("mixloom.serve")
RESTART_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0)
"""Pauses between the restarts of a daemon that keeps dying."""
STEADY_SECONDS = 60.0
"""A daemon that lived so long starts again without a pause."""
SILENT_LEASES = 2
"""A daemon of which nothing is heard for so many leases is killed: stopped, it may hold a lock of the database."""
START_SECONDS = 600.0
"""So long a daemon may take until its first byte. It sends that before it loads its base, but first it imports torch:
minutes, where the disk is slow or the machine does much else."""
POLL_SECONDS = 0.2
OUTAGE_SECONDS = 2.0
"""Until a database is asked again that did not answer."""
YIELDING = 10
"""Added to the daemon's niceness: an answer takes milliseconds, and training whatever is left."""
SWITCH_SECONDS = 0.0002
"""How long a thread may keep Python's lock while others wait for it. A request gives it up at each statement: at the
usual 5 ms a few requests at once wait for each other ten times over."""
EXIT_BAD_BASE = 3


class Supervisor:
    """Keeps one daemon child alive: it starts again when it dies, and is killed when nothing is heard of it.

    A socket ties the two. The child ends itself when our end closes, and sends a byte a second as long as any of its
    threads can run.
    """

    def __init__(self, settings: Settings, flags: list[str]):
        self.settings = settings
        self._flags = flags
        self._id = new_id("sup")
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._asked = itertools.count()  # to end; a signal may come between a look and a set
        self._thread = threading.Thread(target=self._run, name="supervisor")
        self.gave_up = False

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ask the daemon to save every run and end; a second call ends it at once."""
        self._signal(signal.SIGKILL if next(self._asked) else signal.SIGTERM)

    def join(self, seconds: float) -> None:
        """Ask the daemon to end, unless somebody has, wait for that, and kill it when the time is over."""
        if not next(self._asked):
            self._signal(signal.SIGTERM)
        self._thread.join(seconds)
        if self._thread.is_alive():
            log.warning("daemon_killed", extra={"fields": {"after_seconds": seconds}})
            self._signal(signal.SIGKILL)
            self._thread.join()

    def _signal(self, number: signal.Signals) -> None:
        self._stopping.set()
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)

    def _run(self) -> None:
        failures, is_first = 0, True
        while not self._stopping.is_set():
            began = time.monotonic()
            self._child, tether = self._spawn()
            if self._stopping.is_set():  # while it was being started
                self._child.terminate()
            with tether:
                self._watch(self._child, tether)
            code = self._child.wait()
            if self._stopping.is_set():
                if code:
                    self._release()
                return
            if code == EXIT_BAD_BASE and is_first:  # later it was there before, and may be there again
                log.error("no_base", extra={"fields": {"hint": "the daemon's last line says why; mend --base"}})
                self.gave_up = True
                os.kill(os.getpid(), signal.SIGTERM)
                return
            is_first = False
            if code == 0:  # a drain that asked for it
                self._wait_for_undrain()
                continue
            failures = 0 if time.monotonic() - began > STEADY_SECONDS else failures + 1
            pause = RESTART_SECONDS[min(failures, len(RESTART_SECONDS)) - 1] if failures else 0.0
            log.warning("daemon_died", extra={"fields": {"exit_code": code, "restart_in_seconds": pause}})
            self._stopping.wait(pause)

    def _watch(self, child: "subprocess.Popen[bytes]", tether: socket.socket) -> None:
        """Return when the child has closed its end, or was silent for so long that it had to be killed.

        Time is counted in our own looks: when the whole machine slept, nobody was late.
        """
        tether.settimeout(POLL_SECONDS)
        silent, most_seconds = 0, START_SECONDS
        while True:
            try:
                if not tether.recv(1024):
                    return
                silent, most_seconds = 0, SILENT_LEASES * self.settings.lease_seconds
            except TimeoutError:
                if child.poll() is not None:
                    return
                silent += 1
            except OSError:  # it was killed while a byte of ours was on its way
                return
            if silent * POLL_SECONDS > most_seconds:
                log.error("daemon_silent", extra={"fields": {"pid": child.pid}})
                child.kill()
                return

    def _spawn(self) -> "tuple[subprocess.Popen[bytes], socket.socket]":
        command = children.command("server", "daemon", "--supervisor", self._id, *self._flags)
        ours, theirs = socket.socketpair()
        with theirs:
            child = subprocess.Popen(
                command, stdin=theirs.fileno(), env=children.environment_of_daemon(), start_new_session=True
            )
        _let_give_way(child.pid)
        return child, ours

    def _release(self) -> None:
        """What a child held that did not end in order, when it was told to, waits again."""
        try:
            with Database(self.settings.database).write() as session:
                leases.end_children(session, self._id)
        except SQLAlchemyError as error:
            log.warning("lease_not_ended", extra={"fields": {"reason": type(error).__name__}})

    def _wait_for_undrain(self) -> None:
        database = Database(self.settings.database)
        pause = POLL_SECONDS
        while not self._stopping.wait(pause):
            try:
                with database.read() as session:
                    is_drained = drains.asks_to_end(session, self.settings.name_of_daemon)
            except SQLAlchemyError as error:  # it may be what the operator has drained for
                log.warning("drain_not_known", extra={"fields": {"reason": type(error).__name__}})
                pause = OUTAGE_SECONDS
                continue
            if not is_drained:
                break
            pause = POLL_SECONDS
        database.close()


def _let_give_way(pid: int) -> None:
    """Lower the priority of a process that leads a session, before it starts a thread: each thread has its own.

    Linux weighs sessions against each other, by a niceness of theirs (sched(7), "autogroup"), and threads within one.
    """
    niceness = min(os.getpriority(os.PRIO_PROCESS, 0) + YIELDING, 19)
    os.setpriority(os.PRIO_PROCESS, pid, niceness)
    autogroup = Path(f"/proc/{pid}/autogroup")
    if not autogroup.exists():  # a kernel that does not
        return
    try:
        autogroup.write_text(str(niceness))
    except OSError as error:
        log.warning("priority_of_session_not_lowered", extra={"fields": {"reason": error.strerror}})


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: ours stop the daemon too."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(settings: Settings, flags: list[str], *, with_daemon: bool) -> int:
    """Run until SIGTERM or Ctrl-C; the exit code. A second signal ends without saving."""
    configure_logging(settings)
    listener = _bind(settings)
    app = create_app(settings)
    if written := app.state.services.admin_key_written:
        print(f"The operator's key is in {written}", flush=True)
    # Of uvicorn's parsers this one bounds a request's head; left to choose, it takes httptools where that is installed.
    config = uvicorn.Config(app, http="h11", log_config=None, access_log=False, timeout_graceful_shutdown=5)
    server = _Server(config)
    supervisor = Supervisor(settings, flags) if with_daemon else None

    def stop(_signal: int, _frame: FrameType | None) -> None:
        server.should_exit = True
        if supervisor:
            supervisor.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    host, port = listener.getsockname()[:2]
    print(f"Mixloom listens on http://{host}:{port} (data in {settings.data_dir})", flush=True)
    if supervisor:
        supervisor.start()
    sys.setswitchinterval(SWITCH_SECONDS)
    garbage.settle()  # nobody is answered while a collection walks through 140,000 objects
    try:
        server.run(sockets=[listener])
    finally:
        if supervisor:
            supervisor.join(settings.stop_seconds)
    return 1 if supervisor and supervisor.gave_up else 0


def _bind(settings: Settings) -> socket.socket:
    """The listening socket, taken before anything else starts.

    Raises:
        MixloomError: the port is in use, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # asyncio turns off Nagle's delay of 40 ms between an answer's head and body only where the protocol is named.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen()  # a port that is only bound could be taken by a second server
    except OSError as error:
        listener.close()
        raise MixloomError(
            "port_in_use",
            f"Cannot listen on {settings.host}:{settings.port} ({error.strerror}). Stop what uses the port, or "
            "choose another with --port.",
            500,
            "port",
        ) from error
    listener.set_inheritable(False)
    return listener
