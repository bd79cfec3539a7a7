"""The daemon's loop: reconcile, decide, do, record. Between two gangs it obeys what the database says is wanted."""

import logging
import threading
import time
from collections.abc import Mapping, Sequence

from engine.engine import Engine
from scheduler.plan import Plan, plan
from scheduler.promise import longest_waits
from server.daemon.books import Books
from server.daemon.memory import is_out_of_memory
from server.daemon.pace import Pace, Watch
from server.daemon.passes import Passes, Riding
from server.daemon.points import check_there
from server.daemon.program import Diverged
from server.daemon.pulse import Pulse
from server.daemon.recorder import Ended, Recorder
from server.daemon.room import Room
from server.daemon.roster import Resident, Roster
from server.daemon.sampler import Sampler
from server.daemon.shortage import Shortage
from server.daemon.snapshot import take_snapshot
from server.daemon.upkeep import Clock, Upkeep
from server.daemon.writer import Writer
from server.db import daemons, drains, events, runs
from server.db.daemons import Fenced
from server.db.runs import Wish
from server.db.tables import Drain
from server.disk import Disk
from server.settings import Settings
from server.states import ENDED, RESIDENT

log = logging.getLogger("mixloom.daemon")
IDLE_SECONDS = 0.05
REST_SECONDS = 1.0
"""After so long a turn is made although nothing was written: what no row tells, such as a disk that others fill."""
FILL_MIN = 320
"""Rows at which a matmul has 95 % of its speed on a CPU (docs/log.md); `engine.probe` measures others."""


class Loop:
    """One life of the daemon, from ready to stopped."""

    def __init__(
        self,
        engine: Engine,
        books: Books,
        settings: Settings,
        roster: Roster,
        sampler: Sampler,
        writer: Writer,
        *,
        fill_min: int = FILL_MIN,
        pulse: Pulse,
        stopping: threading.Event,
        clock: Clock,
        room: Room | None = None,
    ):
        """Without `room` nobody counts bytes."""
        self.engine = engine
        self.books = books
        self.settings = settings
        self.roster = roster
        self.watch = Watch()  # runs while the engine trains or evaluates
        self.passes = Passes(engine, roster, pulse, self.watch)
        self.recorder = Recorder(books, roster)
        self.sampler = sampler
        self.writer = writer
        self.fill_min = fill_min
        self.pulse = pulse
        self.stopping = stopping
        self.room = room
        self.shortage = Shortage(books, engine.base.hash, roster)
        self.drain: Drain | None = None
        self.hurries = False  # the drain's deadline is over
        self.is_to_exit = False  # a drain asks for it
        self.told: tuple[str, str | None] = ("ready", None)  # the state, and the drain that we rest under
        self.disk = Disk(settings)
        self.waits_for_disk = False
        self.upkeep = Upkeep(books, roster.store, writer, settings, clock)
        self.pace = Pace()
        self.longest_wait = 0  # gangs that a resident run may have to wait
        self.suspect: str | None = None  # a run that waits to be tried alone
        self.company: set[int] = set()  # lives of other daemons that serve this base
        self._version: object = None  # of the database, before the last turn that followed a rest

    @property
    def residents(self) -> list[Resident]:
        return list(self.roster.residents.values())

    def run(self) -> None:
        """Go on until a drain that asks for it, or SIGTERM, has let every run go."""
        while not self._is_over():
            if not self.turn():
                self._rest()
        self.writer.wait()

    def _rest(self) -> None:
        """Until there may be something to do. Who holds runs, or has files to write, looks at all of it each time."""
        began = time.monotonic()
        while True:
            time.sleep(IDLE_SECONDS)
            version = self.books.database.version()  # before the turn: what comes during it is seen after it
            is_at_rest = not self.residents and self.writer.is_idle and not self.stopping.is_set()
            if version != self._version or not is_at_rest or time.monotonic() - began > REST_SECONDS:
                break
            self.pulse.beat()
            self.books.check()
        self._version = version

    def turn(self) -> bool:
        """Reconcile, decide, do, record: one gang and one slice of sampling; whether there was any."""
        self.pulse.beat()
        wishes = self._look()
        self.writer.settle()
        self.upkeep.turn()
        self._reconcile(wishes)
        if self.waits_for_disk:
            self.pace.rest()
            return self.sampler.turn(training_seconds=None)
        decision = self.decide()
        gang = self._gang(decision)
        began = time.monotonic()
        tokens = self.passes.run(gang)
        ended = self._end_units(gang)
        if gang:
            self.pace.add(tokens, began=began, ended=time.monotonic())
        else:
            self.pace.rest()
        self.record(decision, gang, ended)
        for resident, error in ended.without_room:  # who takes it next takes it with what it was charged
            with self.roster.making_room(resident):
                raise error
        for resident in ended.residents:
            with self.roster.making_room(resident):
                self._after_unit(resident)
        if self.is_trying:  # what dies now dies of the one on trial
            return bool(gang)
        sampled = self.sampler.turn(training_seconds=time.monotonic() - began if gang else None)
        return bool(gang) or sampled

    @property
    def is_trying(self) -> bool:
        """Whether a run is suspected of the death of a daemon: it rides alone, or waits for everybody else to leave."""
        return self.suspect is not None or any(resident.is_on_trial for resident in self.residents)

    @property
    def has_company(self) -> bool:
        return bool(self.company)

    @property
    def draining(self) -> bool:
        """Whether no run is to become resident."""
        return self.stopping.is_set() or self.drain is not None

    def _is_over(self) -> bool:
        leaving = self.stopping.is_set() or self.is_to_exit
        return leaving and not self.residents and self.writer.is_idle

    def _look(self) -> dict[str, Wish]:
        """What the database says now: what is wanted of each resident run, and of all. Raises `Fenced`."""
        self.books.check()
        check_there(self.roster.store)
        base_hash, written = self.engine.base.hash, self.books.writes
        with self.books.read() as session:
            live = daemons.live_daemons(session)
            ours = next((one for one in live if one.epoch == self.books.epoch), None)
            if ours is None:
                raise Fenced(f"epoch {self.books.epoch} is over")
            daemons.check_written(ours.epoch, ours.writes, written)
            company = {one.epoch for one in live if one.base_hash == base_hash and one is not ours}
            if company != self.company:
                self.company = company
                self.shortage.forget()
            self.drain = drains.open_drain(session, self.books.name)
            self.is_to_exit = self.drain is not None and drains.asks_to_end(session, self.books.name)
            self.hurries = self.drain is not None and drains.is_past_deadline(session, self.drain)
            self.suspect = None if self.draining else runs.next_suspect(session, base_hash)
            return runs.wishes(session, [resident.job.id for resident in self.residents])

    def _reconcile(self, wishes: Mapping[str, Wish]) -> None:
        """Carry out what tenants and the operator want of the resident runs. Raises `Fenced`."""
        is_fast = self.drain is not None and self.drain.mode == "fast"
        if is_fast and self.residents:
            self.roster.end_writing()
        drains_now = self.stopping.is_set() or self._drains_quickly()
        for resident in self.residents:
            wish = wishes.get(resident.job.id)
            if resident.is_closing:
                continue
            if wish is None or wish.status in ENDED:
                self.roster.drop(resident)
            elif wish.status not in RESIDENT or wish.lease_epoch != self.books.epoch:
                raise Fenced(f"the lease of run {resident.run_id} is lost")
            elif is_fast:
                self.roster.abandon(resident)
            elif (
                wish.requested == "pause"
                or drains_now
                or resident.is_evicted
                or (self.is_trying and not resident.is_on_trial)
            ):
                if self.waits_for_disk and not resident.program.at_boundary:  # its unit would not end
                    resident.begin_unit_anew(is_suspect=resident.is_suspect)
                if resident.program.at_boundary:
                    with self.roster.making_room(resident, goes_on=False):
                        self.roster.leave(resident)
        self.roster.points.forget_ended()
        self._look_at_the_disk()
        self._tell_state()

    def _look_at_the_disk(self) -> None:
        """Training waits while there is no room, or while the disk does not take what was written last."""
        self.disk.tend_ballast()
        trouble = self.writer.trouble
        waits = trouble is not None or self.disk.is_low
        if waits != self.waits_for_disk:
            reason = "the disk is nearly full" if trouble is None else str(trouble.strerror)
            message = f"Training waits for the server's disk ({reason})." if waits else "The disk has room: it goes on."
            log.warning("disk", extra={"fields": {"waits": waits, "reason": reason}})
            with self.books.write() as session:
                for resident in self.residents:
                    if runs.lock_job(session, resident.job.id) is not None:
                        events.record(session, resident.job, "disk_full" if waits else "disk_has_room", message)
            self.waits_for_disk = waits

    def _tell_state(self) -> None:
        """In the books: `drained` from when a drain has let every run go until it ends, else `disk_full` or `ready`."""
        drain = self.drain if not self.residents and self.writer.is_idle else None
        state = "drained" if drain else "disk_full" if self.waits_for_disk else "ready"
        told = (state, drain.id if drain else None)
        if told != self.told:
            with self.books.write() as session:
                daemons.update_daemon(session, self.books.epoch, state=told[0], rests_under=told[1])
            self.told = told

    def _drains_quickly(self) -> bool:
        return self.drain is not None and (self.drain.mode == "quick" or self.hurries)

    def decide(self) -> Plan:
        """Plan, and plan again when a run came into memory, so that it rides in this very gang."""
        sampled = self.sampler.take_costs()
        if self.suspect is not None and not self.residents:
            self.roster.attach(self.suspect, alone=True)
        may_admit = True
        while True:
            snapshot = take_snapshot(
                self.books,
                self.residents,
                self.settings,
                base_hash=self.engine.base.hash,
                fill_min=self.fill_min,
                floor=self.recorder.floor,
                draining=self.draining or self.is_trying,
                sampled=sampled,
                room=self.room,
                passed_over=self.shortage.passed_over,
            )
            decision = plan(snapshot)
            if not decision.admit or not may_admit:
                self.shortage.note(snapshot, decision, has_company=self.has_company)
                self.longest_wait = max(longest_waits(snapshot).values(), default=0)
                return decision
            wanted = decision.admit[: 1 if self.has_company else None]  # who has company leaves the others some
            claimed = [run_id for run_id in wanted if self.roster.attach(run_id, counter=decision.joins.get(run_id))]
            may_admit = bool(claimed) and not self.has_company
            self.recorder.forget_backlogged()

    def _gang(self, decision: Plan) -> list[Riding]:
        for resident in self.residents:
            resident.is_evicted |= resident.run_id in decision.evict
        gang = []
        for slot in decision.gang:
            resident = self.roster.residents[slot.run_id]
            resident.charge(slot.cost)
            gang.append(Riding(resident, resident.program.offered()[: slot.num_microbatches]))
        return gang

    def _end_units(self, gang: Sequence[Riding]) -> Ended:
        """Take the optimizer step, or the mean, of each step or evaluation of the gang that is done."""
        ended = Ended()
        for resident in [r.resident for r in gang if r.resident.run_id in self.roster.residents]:
            if not resident.program.unit_is_done:
                continue
            resident.unit_cost, resident.is_suspect = 0, False
            if resident.program.cursor.evaluating:
                resident.evaluation = resident.program.end_evaluation()
                ended.evaluations.append((resident, resident.evaluation))
                continue
            try:
                with self.watch.running():
                    report = resident.program.end_step(self.engine, resident.run)
                ended.steps.append((resident, report))
            except Diverged as error:
                with self.roster.making_room(resident):
                    self.roster.end_diverged(resident, error.works)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                ended.without_room.append((resident, error))
        return ended

    def record(self, decision: Plan, gang: Sequence[Riding], ended: Ended) -> None:
        """Write what the turn came to, in one transaction."""
        self.recorder.record(decision, gang, ended, self._detail())

    def _after_unit(self, resident: Resident) -> None:
        """Publish and save what is due now that a run stands between two units."""
        program = resident.program
        if program.is_finished:
            self.roster.publish_adapter(resident, final=True)
            return
        if program.checkpoint_is_due():
            self.roster.publish_adapter(resident, final=False)
        steps = self.settings.recovery_steps
        due = steps and program.cursor.step - resident.saved.step >= steps
        if due or time.monotonic() - resident.saved_at > self.settings.recovery_seconds:
            self.roster.save(resident)

    def _detail(self) -> dict[str, object]:
        return {
            "tokens_per_second": round(self.pace.tokens_per_second, 2),
            "gang_seconds": round(self.pace.gang_seconds, 4),
            "engine_seconds": round(self.watch.seconds, 4),
            "resident_runs": len(self.residents),
            "max_resident_runs": self.settings.max_resident_runs,
            "fill_min": self.fill_min,
            "longest_wait_gangs": self.longest_wait,
        }
