"""The resident runs: how one comes into memory, is saved, published, and let go. Knows no fairness and no gangs."""

import errno
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from safetensors import SafetensorError

from engine.adapter import Adapter
from engine.config import AdapterConfig
from engine.engine import Engine
from engine.errors import EngineError
from engine.run import Run
from scheduler.admission import least_pass
from scheduler.cost import Prices
from scheduler.snapshot import Snapshot, WaitingRun
from server.daemon.books import Books
from server.daemon.last_good import Candidate, last_good
from server.daemon.memory import is_out_of_memory
from server.daemon.points import Place, Points, check_there
from server.daemon.prices import prices_of
from server.daemon.program import Cursor, Evaluation, JobProgram, Work
from server.daemon.publisher import Ending, Publisher, State
from server.daemon.writer import Writer
from server.db import accounts, events, recovery_points, runs
from server.db.daemons import Fenced
from server.db.migrate import refuse_newer
from server.db.tables import Job, RecoveryPoint
from server.db.tables import Run as RunRow
from server.faults import fault
from server.resolve import TRAINING_BYTES_PER_PARAMETER
from server.settings import Settings
from server.starts import Damaged, check_start
from server.states import JobStatus
from server.store import LocalStore, is_whole
from server.tokens import TokenRows

log = logging.getLogger("mixloom.daemon")
_OF_THE_PROCESS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT})
"""What the system says that is no file's own fault."""


@dataclass
class Resident:
    """A run in memory, with the job that drives it."""

    job: Job  # as it was when claimed
    adapter: str  # its resolved adapter, as JSON
    run_id: str
    run: Run
    program: JobProgram
    prices: Prices
    cost_charged: int
    cost_at_claim: int  # of that, before it came into memory
    saved: Cursor  # of the newest recovery point
    saved_at: float
    is_evicted: bool = False  # by a plan: it is saved and let go at the next boundary
    is_suspect: bool = False  # a pass of the unit under way failed: each microbatch rides alone
    crash_step: int | None = None  # a daemon died after this step while it held the run; None once it got further
    is_on_trial: bool = False  # for that: nobody else rides until it has passed
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

    def begin_unit_anew(self, *, is_suspect: bool) -> None:
        """After a pass that failed half-way: the gradient of the unit is no sum of whole microbatches."""
        self.is_suspect = is_suspect
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
        self.points = Points(books, store, writer)
        self.publisher = Publisher(engine.base, books, store, writer)
        self.residents: dict[str, Resident] = {}

    def attach(self, run_id: str, *, counter: float | None = None, alone: bool = False) -> bool:
        """Claim a queued run and bring it into memory, from its recovery point if it has one; whether it was to be had.

        `counter` is what it begins at where its tenant has others in memory. `alone`: nobody is there, so it may be one
        that is suspected of the death of a daemon. Raises `database_too_new` for what a newer version has left, which
        has brought the tables to its own.
        """
        fingerprint = vars(self.publisher.fingerprint)
        with self.books.write() as session:
            is_ours = runs.claim(session, run_id, self.books.epoch, fingerprint, alone=alone)
        if not is_ours:
            return False
        with self.books.read() as session:  # it is ours: nobody has to be kept from writing meanwhile
            found = runs.read_run(session, run_id)
            points = recovery_points.of_run(session, run_id)
        if found is None:  # its job was cancelled and deleted
            return False
        self._bring_in(*found, points, counter)
        return True

    def _bring_in(self, job: Job, row: RunRow, points: Sequence[RecoveryPoint], counter: float | None) -> None:
        fault("claim.done", [job.name])
        try:
            resident = self._load(job, row, points)
        except EngineError as error:
            refuse_newer(self.books.database)  # a newer version's daemon can go on with it
            self._check_disk(error)
            self._fail(job, "cannot_start", str(error))
            return
        except (OSError, SafetensorError) as error:  # whose words may name a path
            log.error("rows_unreadable", extra={"fields": {"job": job.id, "reason": str(error)}})
            self._check_disk(error)
            self._fail(job, "cannot_start", "The job's files on the server cannot be read; submit it again.")
            return
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            num_bytes = TRAINING_BYTES_PER_PARAMETER * self.engine.base.layout(_config(job)).size
            self._fail(job, "out_of_memory", _TOO_LARGE.format(bytes=num_bytes))
            return
        cursor = resident.program.cursor
        message = f"Training goes on after step {cursor.step}." if cursor.step else "Training begins."
        with self.books.write() as session:
            charged, seat = resident.cost_charged, self.books.seat
            runs.rewind(session, job, row, seat, step=cursor.step, tokens=cursor.tokens, cost_charged=charged)
            if counter is not None:
                accounts.join(session, row.id, counter)
            moved = runs.move(session, job.id, JobStatus.RUNNING, held_by=self.books.epoch)
            if moved:
                events.record(session, job, "running", message, {"step": cursor.step})
        if moved:
            self.residents[row.id] = resident

    def _check_disk(self, error: Exception) -> None:
        """Raises `Fenced` where it is not the one job's files that are missing or damaged: all would fail by it."""
        if isinstance(error, OSError) and error.errno in _OF_THE_PROCESS:
            raise Fenced(f"files cannot be read ({error})") from error
        check_there(self.store)

    def refuse(self, run: WaitingRun, snapshot: Snapshot) -> None:
        """End the job of a run that would not fit into an empty machine, unless it was in memory before.

        That one has its place on a machine with more, or where less else is in memory.
        """
        tokens = least_pass(snapshot, is_alone=True)
        a_pass = tokens * run.footprint.per_token
        message = _NEVER_FITS.format(
            bytes=run.footprint.resident + run.footprint.copy + a_pass,
            resident=run.footprint.resident,
            copy=run.footprint.copy,
            a_pass=a_pass,
            tokens=tokens,
            memory=snapshot.memory,
        )
        error = {"code": "out_of_memory", "message": message}
        with self.books.write() as session:
            job = runs.lock_queued_job(session, run.run_id)
            if job is not None and job.started_at is not None:
                return
            if job is not None and runs.move(session, job.id, JobStatus.FAILED, finished_at=time.time(), error=error):
                events.record(session, job, "failed", message, {"code": error["code"]})

    def save(self, resident: Resident, then: Callable[[], None] | None = None) -> None:
        """Write a recovery point of a run between two units; `then` runs when it is published."""
        cursor = resident.program.cursor
        if cursor == resident.saved:
            if then:
                self.writer.after(then)
            return
        resident.saved, resident.saved_at = cursor, time.monotonic()
        place = Place(resident.run_id, cursor, resident.cost_charged)
        self.points.save(resident.job, resident.run, place, then or (lambda: None))

    def leave(self, resident: Resident) -> None:
        """Save a run that stands between two units, then let it go."""
        assert resident.program.at_boundary
        resident.is_closing = True
        self.save(resident, then=lambda: self._let_go(resident))

    @contextmanager
    def making_room(self, resident: Resident, *, goes_on: bool = True) -> Iterator[None]:
        """Around what one run needs memory for outside of passes. Where there is none, the run is let go unsaved.

        It goes on from its last recovery point. One that was alone in memory would, where it `goes_on` at once, come
        to the same: it ends.
        """
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            log.exception("no_memory")
            if goes_on and len(self.residents) == 1:
                self.fail(resident, "out_of_memory", _TOO_LARGE_ALONE.format(bytes=resident.run.bytes))
            else:
                self.abandon(resident)

    def abandon(self, resident: Resident) -> None:
        """Let a run go unsaved: it goes on from its last recovery point."""
        self.writer.wait()  # that may be one that is being written
        self._let_go(resident)

    def end_writing(self) -> None:
        """Wait for what is being written, and drop what the disk does not take: who waited for it goes unsaved."""
        while not self.writer.is_idle:
            if self.writer.trouble is not None:
                self.writer.give_up()
                for resident in self.residents.values():
                    resident.is_closing = False
            self.writer.wait_a_moment()

    def drop(self, resident: Resident) -> None:
        """Let a run go whose job has ended."""
        self.residents.pop(resident.run_id, None)
        self.writer.delete(f"recovery/{resident.run_id}")

    def fail(self, resident: Resident, code: str, message: str, *, adapter_id: str | None = None) -> bool:
        """End a job by its own fault; nobody else notices. `adapter_id`: what is left of it.

        False, and nothing was done: that has been deleted.
        """
        done = self._fail(resident.job, code, message, adapter_id)
        if done:
            self.residents.pop(resident.run_id, None)
        return done

    def end_diverged(self, resident: Resident, works: Sequence[Work]) -> None:
        """End a job whose numbers broke, with the last good state of it as an adapter.

        `works` are those whose loss is no number; none where it was the gradient.
        """
        resident.is_closing = True
        self.writer.wait()  # a checkpoint or a recovery point that is being written counts
        cursor = resident.program.cursor
        broke = [resident.program.microbatch(work, resident.run) for work in works]
        good = last_good(self.engine, self._states(resident), broke)
        message = _DIVERGED.format(step=cursor.step if cursor.evaluating else cursor.step + 1)
        if good is None:
            self.fail(resident, "diverged", message + _NOTHING_GOOD)
            return
        state = self._state(resident, good.adapter, good.step)
        message += f" Its state after step {good.step} is kept as adapter '{good.adapter_id or state.id}'."
        if good.adapter_id is not None:
            if not self.fail(resident, "diverged", message, adapter_id=good.adapter_id):
                self.end_diverged(resident, works)
            return
        ending = Ending(JobStatus.FAILED, message, {"code": "diverged", "message": message})
        self.publisher.publish(state, ending, then=lambda: self.drop(resident))

    def _states(self, resident: Resident) -> list[Candidate]:
        """All that is left of a run: in memory, in recovery points, as adapters."""
        with self.books.read() as session:
            points = list(recovery_points.of_run(session, resident.run_id))
            adapters = runs.adapters_of(session, resident.job.id)
        path, load, load_adapter = self.store.path, self.engine.load, self.engine.load_adapter
        return [
            Candidate(resident.program.cursor.step, lambda: resident.run.adapter),
            *(Candidate(one.step, partial(lambda key: load(path(key)).adapter, one.key)) for one in points),
            *(Candidate(one.step, partial(load_adapter, path(one.key)), one.id) for one in adapters),
        ]

    def publish_adapter(self, resident: Resident, *, final: bool) -> None:
        """Make an adapter of the run as it stands; the final one ends its job."""
        resident.is_closing = final
        state = self._state(resident, resident.run.adapter, resident.program.cursor.step)
        if final:
            ending = Ending(JobStatus.SUCCEEDED, "The job is done; its adapter can be downloaded.")
            self.publisher.publish(state, ending, then=lambda: self.drop(resident))
        else:
            self.publisher.publish(state, None, then=lambda: None)

    def _state(self, resident: Resident, adapter: Adapter, step: int) -> State:
        evaluation = resident.evaluation
        valid_loss = evaluation.valid_loss if evaluation and evaluation.step == step else None
        example, _ = resident.program.train.row(0)
        return State(job=resident.job, adapter=adapter, step=step, valid_loss=valid_loss, example=example)

    def _load(self, job: Job, row: RunRow, points: Sequence[RecoveryPoint]) -> Resident:
        folder = self.store.path(job.tokens_key)
        if job.tokens_manifest is not None and not is_whole(folder, job.tokens_manifest):
            raise Damaged("the job's files are not those that were kept at its submission")
        train = TokenRows.load(folder / "train.safetensors")
        valid_path = folder / "valid.safetensors"
        valid = TokenRows.load(valid_path) if valid_path.exists() else None
        point = self.points.newest_whole(job, points)
        if point is None:
            run, cursor, cost_charged = self._fresh(job, folder), Cursor(), 0
        else:
            run, cursor = self.engine.load(self.store.path(point.key)), Cursor(**point.cursor)
            cost_charged = point.cost_charged
        return Resident(
            job=job,
            adapter=json.dumps(job.adapter),
            run_id=row.id,
            run=run,
            program=JobProgram(job.training, train, valid, cursor, job.mixture),
            prices=prices_of(self.engine.base, run.adapter),
            cost_charged=cost_charged,
            cost_at_claim=cost_charged,
            saved=cursor,
            saved_at=time.monotonic(),
            crash_step=row.crash_step,
            is_on_trial=row.crashes >= runs.SUSPECT_CRASHES,
        )

    def _fresh(self, job: Job, folder: Path) -> Run:
        """The run of a job that takes its first step, with the weights that it starts from."""
        if job.init_from is not None:
            check_start(folder, job.init_from["sha256"])
        return self.engine.create_run(_config(job), job.training["seed"], folder if job.init_from else None)

    def _fail(self, job: Job, code: str, message: str, adapter_id: str | None = None) -> bool:
        values = {"error": {"code": code, "message": message}, "adapter_id": adapter_id, "requested": None}
        with self.books.write() as session:
            runs.lock_job(session, job.id)
            if adapter_id is not None and runs.adapter_key(session, adapter_id) is None:
                return False
            ended = {"finished_at": time.time(), **values}
            if runs.move(session, job.id, JobStatus.FAILED, held_by=self.books.epoch, **ended):
                events.record(session, job, "failed", message, {"code": code})
        return True

    def _let_go(self, resident: Resident) -> None:
        """Its job waits again, or is paused if its tenant asked for that; one that has ended stays so."""
        job = resident.job
        with self.books.write() as session:
            now = runs.lock_job(session, job.id)
            is_paused = now is not None and now.requested == "pause"
            target, word = (JobStatus.PAUSED, "paused") if is_paused else (JobStatus.QUEUED, "waiting")
            if runs.move(session, job.id, target, held_by=self.books.epoch, requested=None):
                step = max((point.step for point in recovery_points.of_run(session, resident.run_id)), default=0)
                message = f"The job is {word}, saved at step {step}."
                events.record(session, job, word, message, {"step": step})
        self.residents.pop(resident.run_id, None)


_DIVERGED = (
    "The loss or the gradient became infinite or not a number at step {step}. Lower the learning rate, or look "
    "for extreme rows in the data."
)
_NOTHING_GOOD = (
    " No adapter is left of it: no state from before that is kept and gives numbers. A smaller checkpoint_every keeps "
    "some earlier."
)
_TOO_LARGE_ALONE = (
    "The adapter with its gradient and its moments takes {bytes} bytes, which leave no memory for its optimizer step "
    "or for the copy that is saved. Use fewer experts, fewer target modules or a smaller rank."
)
_NEVER_FITS = (
    "This job needs {bytes} bytes: {resident} for its adapter, gradient and moments, {copy} for the copy that is "
    "saved, {a_pass} for a pass of {tokens} tokens. This server has {memory} beside its base. Use fewer experts, fewer "
    "target modules or a smaller rank."
)
_TOO_LARGE = (
    "The adapter with its gradient and its moments needs {bytes} bytes, which do not fit into memory beside the other "
    "jobs'. Use fewer experts, fewer target modules or a smaller rank."
)


def _config(job: Job) -> AdapterConfig:
    return AdapterConfig.from_dict(job.adapter)
