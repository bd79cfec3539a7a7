"""The heartbeats of a life, and the watch over its loop, each from a thread of its own.

A heartbeat may have to wait long for the database, which a loop that hangs may have locked.
"""

import faulthandler
import logging
import os
import socket
import threading

from sqlalchemy.exc import SQLAlchemyError

from server.daemon.books import Books
from server.daemon.pulse import Pulse
from server.db.daemons import Fenced

log = logging.getLogger("mixloom.daemon")
BEATS_PER_LEASE = 15
TETHER_SECONDS = 1.0
EXIT_HUNG = 4


class Heart:
    """Beats inside `with`. A loop that hangs is ended with its process; that a lease is lost the loop finds out."""

    def __init__(self, books: Books, pulse: Pulse):
        self._books = books
        self._pulse = pulse
        self._ended = threading.Event()
        self._seconds = books.lease_seconds / BEATS_PER_LEASE
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._beat, "heart"), (self._watch, "watch"))
        ]

    def __enter__(self) -> "Heart":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._seconds):
            if self._pulse.is_hung(self._seconds):
                log.error("hung", extra={"fields": {"longest_seconds": round(self._pulse.longest_seconds, 1)}})
                faulthandler.dump_traceback()  # where it hangs
                os._exit(EXIT_HUNG)

    def _beat(self) -> None:
        while not self._ended.wait(self._seconds):
            try:
                self._books.renew()
            except Fenced as error:  # the loop may hang all the same
                log.warning("fenced", extra={"fields": {"reason": str(error)}})
            except SQLAlchemyError as error:  # the next one may go through; else the lease runs out
                log.warning("no_heartbeat", extra={"fields": {"reason": type(error).__name__}})


def hold_to_supervisor() -> None:
    """Standard input is a socket of the supervisor's: closed, nobody watches over us; and it hears that we live."""
    tether = socket.socket(fileno=0)  # not `sys.stdin`: its lock, held here, would abort an orderly end
    tether.settimeout(TETHER_SECONDS)
    threading.Thread(target=_live_with, args=(tether,), name="tether", daemon=True).start()


def _live_with(tether: socket.socket) -> None:
    while True:
        try:
            tether.send(b".")
            if not tether.recv(1):
                os._exit(1)
        except TimeoutError:
            continue
        except OSError:
            os._exit(1)
