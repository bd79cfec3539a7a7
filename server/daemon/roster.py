"""The resident runs: how one comes into memory, is saved, published, and let go. Knows no fairness and no gangs."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError

from engine import formats, recovery
from engine.base_model import Fingerprint
from engine.config import AdapterConfig
from engine.engine import Engine
from engine.errors import EngineError
from engine.run import Run
from scheduler.cost import Prices
from server.daemon.books import Books
from server.daemon.model_card import model_card
from server.daemon.prices import prices_of
from server.daemon.program import Cursor, Evaluation, JobProgram
from server.daemon.writer import Writer, manifest
from server.db import events, recovery_points, runs
from server.db.tables import Adapter, Job, RecoveryPoint
from server.db.tables import Run as RunRow
from server.ids import new_id
from server.settings import Settings
from server.starts import check_start
from server.states import JobStatus
from server.store import LocalStore
from server.tokens import TokenRows

log = logging.getLogger("mixloom.daemon")


@dataclass
class Resident:
    """A run in memory, with the job that drives it."""

    job: Job  # as it was when claimed
    run_id: str
    run: Run
    program: JobProgram
    prices: Prices
    cost_charged: int
    cost_at_claim: int  # of that, before it came into memory
    saved: Cursor  # of the newest recovery point
    saved_at: float
    is_evicted: bool = False  # by a plan: it is saved and let go at the next boundary
    is_suspect: bool = False  # the last pass that it rode in failed
    is_closing: bool = False  # its last write is under way: it offers nothing any more
    evaluation: Evaluation | None = None  # the last one
    step_began: float = field(default_factory=time.monotonic)
    unit_cost: int = 0  # charged for the step or evaluation under way
    refund: int = 0  # of that, to be given back: others made its pass fail

    @property
    def served(self) -> int:
        """Cost charged since it came into memory."""
        return self.cost_charged - self.cost_at_claim

    def charge(self, cost: int) -> None:
        """For microbatches of the unit under way."""
        self.cost_charged += cost
        self.unit_cost += cost

    def begin_unit_anew(self) -> None:
        """After a pass that failed half-way: the gradient of the unit is no sum of whole microbatches."""
        self.is_suspect = True
        self.refund, self.unit_cost = self.unit_cost, 0
        self.cost_charged -= self.refund
        self.run.discard_gradient()
        self.program.begin_unit_anew()


class Roster:
    """All resident runs, by run id."""

    def __init__(self, engine: Engine, books: Books, store: LocalStore, writer: Writer, settings: Settings):
        self.engine = engine
        self.books = books
        self.store = store
        self.writer = writer
        self.settings = settings
        self.fingerprint = Fingerprint.of(engine.base)
        self.residents: dict[str, Resident] = {}

    def attach(self, run_id: str) -> None:
        """Claim a queued run and bring it into memory, from its recovery point if it has one."""
        with self.books.write() as session:
            claimed = runs.claim(session, run_id, self.books.epoch, vars(self.fingerprint))
            points = list(recovery_points.of_run(session, run_id))
        if claimed is None:
            return
        job, row = claimed
        try:
            resident = self._load(job, row, points)
        except EngineError as error:
            self._fail(job, run_id, "cannot_start", str(error))
            return
        except (OSError, SafetensorError) as error:  # whose words may name a path
            log.error("rows_unreadable", extra={"fields": {"job": job.id, "reason": str(error)}})
            self._fail(job, run_id, "cannot_start", "The job's files on the server cannot be read; submit it again.")
            return
        step = resident.program.cursor.step
        message = f"Training goes on after step {step}." if step else "Training begins."
        with self.books.write() as session:
            moved = runs.move(session, job.id, JobStatus.RUNNING)
            if moved:
                events.record(session, job, "running", message, {"step": step})
        if moved:
            self.residents[run_id] = resident

    def save(self, resident: Resident, then: Callable[[], None] | None = None) -> None:
        """Write a recovery point of a run between two units; `then` runs when it is published."""
        cursor = resident.program.cursor
        if cursor == resident.saved:
            if then:
                self.writer.after(then)
            return
        snapshot, cost_charged = recovery.capture(resident.run), resident.cost_charged
        resident.saved, resident.saved_at = cursor, time.monotonic()
        place = f"{self.books.epoch}-{cursor.step}{'-evaluating' if cursor.evaluating else ''}"
        key = f"recovery/{resident.run_id}/{place}"

        def publish(files: dict[str, str]) -> None:
            with self.books.write() as session:
                runs.lock_job(session, resident.job.id)
                old = recovery_points.publish(
                    session,
                    run_id=resident.run_id,
                    epoch=self.books.epoch,
                    step=cursor.step,
                    cursor=cursor.as_dict(),
                    cost_charged=cost_charged,
                    key=key,
                    manifest=files,
                )
            for old_key in old:
                self.writer.delete(old_key)
            if then:
                then()

        self.writer.put(key, lambda folder: recovery.write(snapshot, folder), publish)

    def leave(self, resident: Resident) -> None:
        """Save a run that stands between two units, then let it go."""
        assert resident.program.at_boundary
        resident.is_closing = True
        self.save(resident, then=lambda: self._let_go(resident))

    def abandon(self, resident: Resident) -> None:
        """Let a run go unsaved: it goes on from its last recovery point."""
        self.writer.wait()  # that may be one that is being written
        self._let_go(resident)

    def drop(self, resident: Resident) -> None:
        """Let a run go whose job has ended."""
        self.residents.pop(resident.run_id, None)
        self.writer.delete(f"recovery/{resident.run_id}")

    def fail(self, resident: Resident, code: str, message: str) -> None:
        """End a job by its own fault; nobody else notices."""
        self.residents.pop(resident.run_id, None)
        self._fail(resident.job, resident.run_id, code, message)

    def publish_adapter(self, resident: Resident, *, final: bool) -> None:
        """Make an adapter of the run as it stands; the final one ends its job."""
        resident.is_closing = final
        job, step = resident.job, resident.program.cursor.step
        evaluation = resident.evaluation
        valid_loss = evaluation.valid_loss if evaluation and evaluation.step == step else None
        adapter_id = new_id("adp")
        key = f"adapters/{adapter_id}"
        base = self.engine.base
        tensors = formats.tensors(resident.run.adapter)
        config = formats.disk_config(
            resident.run.adapter.config, base_name=job.base_name, activation=base.activation_name
        )
        example, _ = resident.program.train.row(0)
        card = model_card(self.store, job, example, step=step, valid_loss=valid_loss, fingerprint=self.fingerprint)

        def publish(files: dict[str, str]) -> None:
            weights = self.store.path(key) / formats.WEIGHTS
            row = Adapter(
                id=adapter_id,
                tenant_id=job.tenant_id,
                name=job.name if final else f"{job.name}, step {step}",
                job_id=job.id,
                step=step,
                final=final,
                base_name=job.base_name,
                base_hash=job.base_hash,
                method=job.adapter["method"],
                config=job.adapter,
                valid_loss=valid_loss,
                exact=job.exact,
                key=key,
                sha256=files[formats.WEIGHTS],
                bytes=weights.stat().st_size,
                created_at=time.time(),
            )
            for old_key in self._add_adapter(resident, row):
                self.writer.delete(old_key)

        self.writer.put(key, lambda folder: formats.write(tensors, config, folder, card), publish)

    def _add_adapter(self, resident: Resident, row: Adapter) -> list[str]:
        """Insert the adapter, end the job if it is the final one; the keys to delete from the store."""
        job, data = resident.job, {"step": row.step, "adapter_id": row.id, "sha256": row.sha256}
        with self.books.write() as session:
            added = False
            exists = runs.lock_job(session, job.id) is not None
            if row.final:
                values = {"adapter_id": row.id, "finished_at": time.time(), "requested": None}
                if runs.move(session, job.id, JobStatus.SUCCEEDED, **values):
                    added = runs.add_adapter(session, row)
                    events.record(session, job, "succeeded", "The job is done; its adapter can be downloaded.", data)
            elif exists:
                added = runs.add_adapter(session, row)
                if added:
                    events.record(session, job, "checkpoint", f"Checkpoint of step {row.step}.", data)
            session.flush()
            surplus = runs.surplus_checkpoints(session, job.id, job.training["keep_checkpoints"])
            for old in surplus:
                session.delete(old)
        if row.final:
            self.drop(resident)
        return [old.key for old in surplus] + ([] if added else [row.key])

    def _load(self, job: Job, row: RunRow, points: list[RecoveryPoint]) -> Resident:
        folder = self.store.path(job.tokens_key)
        train = TokenRows.load(folder / "train.safetensors")
        valid_path = folder / "valid.safetensors"
        valid = TokenRows.load(valid_path) if valid_path.exists() else None
        point = self._newest_valid(job, points)
        if point is None:
            run, cursor, cost_charged = self._fresh(job, folder), Cursor(), 0
        else:
            run, cursor = self.engine.load(self.store.path(point.key)), Cursor(**point.cursor)
            cost_charged = point.cost_charged
        with self.books.write() as session:
            runs.rewind(session, job, row, step=cursor.step, tokens=cursor.tokens, cost_charged=cost_charged)
        return Resident(
            job=job,
            run_id=row.id,
            run=run,
            program=JobProgram(job.training, train, valid, cursor, job.mixture),
            prices=prices_of(self.engine.base, run.adapter),
            cost_charged=cost_charged,
            cost_at_claim=cost_charged,
            saved=cursor,
            saved_at=time.monotonic(),
        )

    def _fresh(self, job: Job, folder: Path) -> Run:
        """The run of a job that takes its first step, with the weights that it starts from."""
        if job.init_from is not None:
            check_start(folder, job.init_from["sha256"])
        return self.engine.create_run(_config(job), job.training["seed"], folder if job.init_from else None)

    def _newest_valid(self, job: Job, points: list[RecoveryPoint]) -> RecoveryPoint | None:
        """The newest recovery point whose files are what its row says; damaged ones before it are forgotten.

        Raises:
            EngineError: there are points, and none is whole: never a silent start from zero.
        """
        for point in points:
            folder = self.store.path(point.key)
            if folder.is_dir() and manifest(folder) == point.manifest:
                return point
            message = f"The recovery point of step {point.step} is damaged; an older one is tried."
            with self.books.write() as session:
                recovery_points.remove(session, point.id)
                events.record(session, job, "recovery_point_broken", message, {"step": point.step})
            self.writer.delete(point.key)
        if points:
            raise EngineError("Every recovery point of this job is damaged; submit it again.")
        return None

    def _fail(self, job: Job, run_id: str, code: str, message: str) -> None:
        error = {"code": code, "message": message}
        with self.books.write() as session:
            failed = JobStatus.FAILED
            if runs.move(session, job.id, failed, error=error, finished_at=time.time(), requested=None):
                events.record(session, job, "failed", message, {"code": code})

    def forget_ended(self) -> None:
        """Erase the recovery points of jobs that have ended, whoever ended them."""
        with self.books.read() as session:
            ended = recovery_points.runs_ended(session)
        if not ended:
            return
        with self.books.write() as session:
            recovery_points.forget(session, ended)
        for run_id in ended:
            self.writer.delete(f"recovery/{run_id}")

    def _let_go(self, resident: Resident) -> None:
        """Its job waits again, or is paused if its tenant asked for that; one that has ended stays so."""
        job, step = resident.job, resident.saved.step
        with self.books.write() as session:
            now = runs.lock_job(session, job.id)
            is_paused = now is not None and now.requested == "pause"
            target, word = (JobStatus.PAUSED, "paused") if is_paused else (JobStatus.QUEUED, "waiting")
            if runs.move(session, job.id, target, requested=None):
                message = f"The job is {word}, saved at step {step}."
                events.record(session, job, word, message, {"step": step})
        self.residents.pop(resident.run_id, None)


def _config(job: Job) -> AdapterConfig:
    return AdapterConfig.from_dict(job.adapter)
