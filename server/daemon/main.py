"""The daemon's life: lock, load the base, publish it, claim an epoch, run the loop."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from transformers.utils.logging import disable_progress_bar

from engine import base_model, sources
from engine.base_model import BaseModel
from engine.engine import Engine
from engine.errors import EngineError
from engine.probe import choose_device, choose_dtype, fewest_rows, probe
from server.daemon.books import Books
from server.daemon.lock import hold
from server.daemon.loop import Loop
from server.daemon.publish import base_row, publish_tokenizer
from server.daemon.roster import Roster
from server.daemon.sampler import Sampler
from server.daemon.upkeep import clear_orphans
from server.daemon.writer import Writer
from server.db import bases, daemons, operations, runs
from server.db.daemons import Fenced
from server.db.migrate import upgrade
from server.db.session import Database
from server.disk import Disk, is_full
from server.logs import configure_logging
from server.settings import Settings
from server.store import LocalStore

log = logging.getLogger("mixloom.daemon")
HEARTBEAT_SECONDS = 2.0
FULL_SECONDS = 5.0
EXIT_BAD_BASE = 3
"""The base cannot be loaded: starting again would not help."""


def main(settings: Settings, *, supervised: bool) -> int:
    """Run the daemon until it is told to end; its exit code."""
    configure_logging(settings)
    if supervised:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    upgrade(settings)
    lock = hold(settings.data_dir / "daemon.lock")
    with lock:
        try:
            while (code := _until_full(settings)) is None:
                time.sleep(FULL_SECONDS)
            return code
        except EngineError as error:
            log.error("base_not_loaded", extra={"fields": {"reason": str(error)}})
            return EXIT_BAD_BASE
        except Fenced as error:
            log.error("fenced", extra={"fields": {"reason": str(error)}})
            return 1


def _until_full(settings: Settings) -> int | None:
    """The exit code of a life; None if it has ended because rows did not fit on the disk: another one begins later.

    Nothing is lost with it: the next one goes on from recovery points, as after a kill.
    """
    try:
        return _live(settings)
    except (OSError, DBAPIError) as error:
        if not is_full(error):
            raise
        log.error("disk_full", extra={"fields": {"reason": str(error), "retry_in_seconds": FULL_SECONDS}})
        Disk(settings).give_up_ballast()
        return None


def _live(settings: Settings) -> int:
    database, store = Database(settings.database), LocalStore(settings.data_dir)
    books = begin(database)
    ended = threading.Event()
    heart = threading.Thread(target=_heartbeat, args=(books, ended), daemon=True)
    heart.start()
    writer = Writer(store)
    try:
        _train(settings, books, store, writer)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        writer.close()
        ended.set()
        heart.join()
    with books.write() as session:
        daemons.update_daemon(session, books.epoch, state="stopped", ended_at=time.time())
    log.info("stopped", extra={"fields": {"epoch": books.epoch}})
    return 0


def _train(settings: Settings, books: Books, store: LocalStore, writer: Writer) -> None:
    """Load the base, publish it, and run the loop until it is told to end."""
    clear_orphans(books, store)
    base, probed, source = _load_base(settings)
    folder_key = publish_tokenizer(store, base, source, settings)
    engine = Engine(base)
    roster = Roster(engine, books, store, writer, settings)
    fill_min = fewest_rows(base, settings.microbatch_tokens)
    sampler = Sampler(engine, books, store, settings)
    loop = Loop(engine, books, settings, roster, sampler, writer, fill_min=fill_min)
    signal.signal(signal.SIGTERM, _stopper(loop))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the supervisor, which tells us
    with books.write() as session:
        bases.publish(session, base_row(base, source=source, folder_key=folder_key, probed=probed))
        daemons.update_daemon(session, books.epoch, base_hash=base.hash, state="ready")
    log.info("ready", extra={"fields": {"base": base.name, "dtype": str(base.dtype), "epoch": books.epoch}})
    loop.run()


def begin(database: Database) -> Books:
    """Claim an epoch, which fences every earlier life, and put back what the last one held."""
    with database.write() as session:
        epoch = daemons.begin_epoch(session, os.getpid())
        runs.release_all(session)
        operations.restart_running(session)
    return Books(database, epoch)


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
    )
    return base, probed, source


def _stopper(loop: Loop) -> Callable[[int, FrameType | None], None]:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        """First: save every run at its next optimizer step and end. Second: end now."""
        if loop.is_stopping:
            os._exit(1)
        loop.is_stopping = True

    return stop


def _heartbeat(books: Books, ended: threading.Event) -> None:
    """Say every two seconds that this life goes on; a fenced one ends at once."""
    while not ended.wait(HEARTBEAT_SECONDS):
        try:
            with books.write() as session:
                daemons.update_daemon(session, books.epoch)
        except Fenced:
            log.error("fenced", extra={"fields": {"epoch": books.epoch}})
            os._exit(1)
        except SQLAlchemyError as error:
            if is_full(error):
                continue
            log.exception("no_heartbeat")  # nobody would know that it lives: the supervisor starts another
            os._exit(1)


def _end_with_parent() -> None:
    """Standard input is a pipe that the supervisor holds open: when it closes, nobody watches over us."""
    while os.read(sys.stdin.fileno(), 1):  # not `sys.stdin`: its lock, held here, would abort an orderly end
        pass
    os._exit(1)
