"""Recovery points of runs: written from a copy, published by their row, trusted only when whole."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine import recovery
from engine.errors import EngineError
from engine.run import Run
from server.daemon.books import Books
from server.daemon.program import Cursor
from server.daemon.writer import Writer
from server.db import events, recovery_points, runs
from server.db.daemons import Fenced
from server.db.stores import read_mark
from server.db.tables import Job, RecoveryPoint
from server.faults import fault
from server.ids import new_id
from server.store import LocalStore, Manifest, is_whole

log = logging.getLogger("mixloom.daemon")


@dataclass(frozen=True)
class Place:
    """Where a run stands between two units."""

    run_id: str
    cursor: Cursor
    cost_charged: int


class Points:
    """Writes, finds and erases them."""

    def __init__(self, books: Books, store: LocalStore, writer: Writer):
        self.books = books
        self.store = store
        self.writer = writer

    def save(self, job: Job, run: Run, place: Place, then: Callable[[], None]) -> None:
        """Copy a run, and write the copy while training goes on; `then` runs when its row is there."""
        snapshot = recovery.capture(run)
        id_, step = new_id("rec"), place.cursor.step
        key = f"recovery/{place.run_id}/{self.books.epoch}-{step}-{id_}"

        def publish(files: Manifest) -> None:
            check_there(self.store)
            point = RecoveryPoint(
                id=id_,
                run_id=place.run_id,
                epoch=self.books.epoch,
                step=step,
                cursor=place.cursor.as_dict(),
                cost_charged=place.cost_charged,
                key=key,
                manifest=files,
                created_at=time.time(),
            )
            with self.books.write() as session:
                runs.lock_job(session, job.id)
                old = recovery_points.publish(session, point)
            fault("point.published")
            for old_key in old:
                self.writer.delete(old_key)
            then()

        self.writer.put(
            key,
            lambda folder: recovery.write(snapshot, folder),
            publish,
            lambda error: tell_of_failure(self.books, job, f"The recovery point of step {step}", error),
        )

    def newest_whole(self, job: Job, points: Sequence[RecoveryPoint]) -> RecoveryPoint | None:
        """The newest whose files are what its row says, None if there are no points; damaged ones are forgotten.

        Raises:
            EngineError: there are points, and none is whole: never a silent start from zero.
        """
        broken: list[RecoveryPoint] = []
        for point in points:
            if is_whole(self.store.path(point.key), point.manifest):
                self._forget(job, broken)
                return point
            log.error("recovery_point_broken", extra={"fields": {"job": job.id, "step": point.step, "key": point.key}})
            broken.append(point)
        if broken:  # their rows stay until the job has failed
            raise EngineError("Every recovery point of this job is damaged; submit it again.")
        return None

    def forget_ended(self) -> None:
        """Erase the points of jobs that have ended, whoever ended them."""
        with self.books.glance() as connection:
            ended = recovery_points.runs_ended(connection, self.books.epoch)
        if not ended:
            return
        with self.books.write() as session:
            recovery_points.forget(session, ended)
        for run_id in ended:
            self.writer.delete(f"recovery/{run_id}")

    def _forget(self, job: Job, broken: Sequence[RecoveryPoint]) -> None:
        if not broken:
            return
        with self.books.write() as session:
            for point in broken:
                message = f"The recovery point of step {point.step} is damaged; the one before it is taken."
                recovery_points.remove(session, point.id)
                events.record(session, job, "recovery_point_broken", message, {"step": point.step})
        for point in broken:
            self.writer.delete(point.key)


def check_there(store: LocalStore) -> None:
    """Raises `Fenced`: the data directory is gone. Of a shared folder that is not mounted an empty one may be there."""
    if read_mark(store.root) is None:
        raise Fenced("the data directory is not there")


def tell_of_failure(books: Books, job: Job, what: str, error: OSError) -> None:
    """An event of a job whose files the disk did not take at once."""
    message = f"{what} could not be written ({error.strerror}). What was written is thrown away; it is written anew."
    with books.write() as session:
        if runs.lock_job(session, job.id) is not None:
            events.record(session, job, "write_failed", message, {"reason": error.strerror})
