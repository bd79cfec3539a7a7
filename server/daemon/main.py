"""The daemon's process: it loads the base once and lives, and lives again when its lease is lost."""

import logging
import os
import signal
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from transformers.utils.logging import disable_progress_bar

from engine import base_model, sources
from engine.base_model import BaseModel
from engine.engine import Engine
from engine.errors import EngineError
from engine.memory import measure
from engine.probe import choose_device, choose_dtype, fewest_rows, probe
from engine.rehearsal import rehearse
from server import garbage
from server.daemon.books import Books
from server.daemon.heart import Heart, hold_to_supervisor
from server.daemon.lock import hold
from server.daemon.loop import Loop
from server.daemon.publish import base_row, publish_tokenizer, read_tokenizer
from server.daemon.pulse import Pulse
from server.daemon.room import Room, limit_bytes
from server.daemon.roster import Roster
from server.daemon.sampler import Sampler
from server.daemon.snapshot import most_tokens
from server.daemon.upkeep import Clock, clear_orphans
from server.daemon.writer import Writer
from server.data_dir import DAEMON_LOCK, ensure_data_dir
from server.db import bases, daemons
from server.db.daemons import Fenced
from server.db.migrate import upgrade
from server.db.session import Database, is_outage
from server.db.stores import refuse_other_store
from server.db.tables import Base
from server.disk import Disk, is_full
from server.errors import MixloomError
from server.logs import configure_logging
from server.settings import Settings
from server.store import LocalStore

log = logging.getLogger("mixloom.daemon")
BACK_OFF_SECONDS = (0.0, 0.5, 1.0, 2.0, 5.0)
STEADY_SECONDS = 60.0
"""A life that lasted so long is followed by the next one without a pause."""
END_SECONDS = 3.0
"""So long the database may take to hear of the end of a life that a second signal ends."""
EXIT_BAD_BASE = 3
"""The base cannot be loaded: starting again would not help."""


def main(settings: Settings, *, supervisor: str | None) -> int:
    """Run the daemon until it is told to end; its exit code."""
    configure_logging(settings)
    if supervisor is not None:
        hold_to_supervisor()
    ensure_data_dir(settings)
    database = Database(settings.database)
    lock, supervised = settings.data_dir / DAEMON_LOCK, supervisor is not None
    with nullcontext() if database.path is None else hold(lock, supervised=supervised):
        upgrade(settings, is_daemon=True)
        refuse_other_store(settings, database)
        try:
            return Daemon(settings, database, supervisor).run()
        except EngineError as error:
            log.error("base_not_loaded", extra={"fields": {"reason": str(error)}})
            return EXIT_BAD_BASE


@dataclass(frozen=True)
class Served:
    """A base in memory: it outlasts the lives that serve it."""

    engine: Engine
    row: Base
    tokenizer: dict[str, bytes]
    room: Room
    fill_min: int
    pass_seconds: float  # of a full pass, were it as fast as the probe


class Daemon:
    """One process. It begins another life when one is lost: overtaken, out of touch with the database, out of room."""

    def __init__(self, settings: Settings, database: Database, supervisor: str | None):
        self.settings = settings
        self.database = database
        self.supervisor = supervisor
        self.store = LocalStore(settings.data_dir)
        self.stopping = threading.Event()
        self.clock = Clock()
        self.served: Served | None = None
        self.books: Books | None = None
        signal.signal(signal.SIGTERM, self._stop)
        # A supervisor is who hears of Ctrl-C, and tells us.
        signal.signal(signal.SIGINT, self._stop if supervisor is None else signal.SIG_IGN)

    def run(self) -> int:
        """Live until told to end, and let nothing but a bug or a bad base be the end; the exit code.

        Raises `database_too_new`: a newer version has brought the tables to its own, and works on them.
        """
        last: int | None = None
        lost = 0  # lives in a row that got nowhere
        while True:
            began = time.monotonic()
            try:
                self.books = books = Books.begin(
                    self.database,
                    lease_seconds=self.settings.lease_seconds,
                    supervisor=self.supervisor,
                    name=self.settings.name_of_daemon,
                    before=last,
                )
                last = books.epoch
                self._live(books)
                return 0
            except MixloomError:  # nobody is to blame, and a start says the same
                self._end_life()
                raise
            except (Fenced, OSError, SQLAlchemyError) as error:
                if is_full(error):
                    Disk(self.settings).give_up_ballast()
                elif isinstance(error, OSError) or (isinstance(error, SQLAlchemyError) and not is_outage(error)):
                    raise
                lost = 0 if time.monotonic() - began > STEADY_SECONDS else lost + 1
                pause = BACK_OFF_SECONDS[min(lost, len(BACK_OFF_SECONDS) - 1)]
                log.warning("life_lost", extra={"fields": {"reason": _said(error), "again_in_seconds": pause}})
            if self.stopping.wait(pause):
                return 1

    def _live(self, books: Books) -> None:
        """One life: what is in memory of it is gone when it ends, and comes back from recovery points."""
        pulse = Pulse(self.settings.hang_seconds)
        writer = Writer(self.store, pulse.beat)
        try:
            with Heart(books, pulse):
                clear_orphans(books, self.store)
                served = self.served = self.served or self._load()
                pulse.expect(served.pass_seconds)
                roster = Roster(served.engine, books, self.store, writer, self.settings)
                sampler = Sampler(served.engine, books, self.store, self.settings)
                loop = Loop(
                    served.engine,
                    books,
                    self.settings,
                    roster,
                    sampler,
                    writer,
                    fill_min=served.fill_min,
                    pulse=pulse,
                    stopping=self.stopping,
                    clock=self.clock,
                    room=served.room,
                )
                publish_tokenizer(self.store, served.engine.base, served.tokenizer)
                with books.write() as session:
                    bases.publish(session, served.row)
                    daemons.update_daemon(session, books.epoch, base_hash=served.row.hash, state="ready")
                log.info("ready", extra={"fields": {"base": served.row.name, "epoch": books.epoch}})
                rehearse(served.engine)  # before the first beat, so that what it compiles is no silence (`Pulse`)
                loop.run()
            books.end()
        finally:
            writer.close()
        log.info("stopped", extra={"fields": {"epoch": books.epoch}})

    def _load(self) -> Served:
        limit = limit_bytes(self.settings, torch.device(choose_device(self.settings.device)))
        base, probed, source = _load_base(self.settings)
        tokenizer = read_tokenizer(base, source, self.settings)
        row = base_row(base, source=source, tokenizer=tokenizer, probed=probed, memory=measure(base))
        room = Room.beside(row, limit, base.device)
        flops = 6 * base.num_parameters * most_tokens(self.settings)
        speed = probed.get(row.dtype, 0.0) * 1e9
        fill_min = fewest_rows(base, self.settings.microbatch_tokens)
        engine = Engine(base)
        garbage.settle()  # torch, the base and all else
        return Served(engine, row, tokenizer, room, fill_min, flops / speed if speed else 0.0)

    def _stop(self, _signal: int, _frame: FrameType | None) -> None:
        """First: save every run at its next optimizer step and end, within `stop_seconds`. Second: end now."""
        is_first = not self.stopping.is_set()
        self.stopping.set()
        if is_first and self.supervisor is not None:
            return  # it kills us in time
        # In a thread, since what is interrupted here may hold locks of the database.
        end = threading.Timer(self.settings.stop_seconds if is_first else 0.0, self._end_now)
        end.daemon = True
        end.start()

    def _end_now(self) -> None:
        """End the life and the process; where the database takes too long that alone."""
        threading.Timer(END_SECONDS, os._exit, (1,)).start()
        self._end_life()
        os._exit(1)

    def _end_life(self) -> None:
        """So that no job is to blame, if the database takes it."""
        try:
            if self.books is not None:
                self.books.end()
        except (Fenced, SQLAlchemyError) as error:
            log.warning("lease_not_ended", extra={"fields": {"reason": type(error).__name__}})


def _said(error: Fenced | OSError | SQLAlchemyError) -> str:
    """Why, without a statement's text."""
    return f"the database: {error.orig}" if isinstance(error, DBAPIError) else str(error)


def _load_base(settings: Settings) -> tuple[BaseModel, dict[str, float], Path]:
    if not sys.stderr.isatty():
        disable_progress_bar()  # it is no line of a log
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = choose_device(settings.device)
    probed = probe(device)
    name = choose_dtype(probed, device) if settings.dtype == "auto" else settings.dtype
    source = sources.resolve(settings.base)
    base = base_model.load(
        source,
        name=settings.base,
        dtype=getattr(torch, name),
        device=device,
        microbatch_tokens=settings.microbatch_tokens,
        recompute=settings.recompute,
    )
    return base, probed, source
