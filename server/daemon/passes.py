"""A gang as passes, and whose fault it is when one fails: that job ends alone, the others lose only time."""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from engine.engine import Engine
from engine.run import Outcome
from server.daemon.memory import bytes_asked, is_out_of_memory
from server.daemon.pace import Watch
from server.daemon.pass_limit import PassLimit
from server.daemon.program import Diverged, Work
from server.daemon.pulse import Pulse
from server.daemon.roster import Resident, Roster
from server.faults import fault

log = logging.getLogger("mixloom.daemon")


@dataclass
class Riding:
    """One run's part of a gang."""

    resident: Resident
    works: list[Work]


@dataclass(frozen=True)
class Seat:
    """One microbatch of a pass."""

    resident: Resident
    work: Work


class Passes:
    """Runs gangs, and remembers how much fits into one pass.

    When a pass fails, its runs begin their units anew: half of a sum is no gradient. If memory ran out, the next
    passes are half as large, down to single microbatches. If it was anything else (a broken row), each microbatch of
    these units has a pass of its own. Who fails alone is at fault.
    """

    def __init__(self, engine: Engine, roster: Roster, pulse: Pulse, watch: Watch):
        """`watch` runs while the engine works."""
        self.engine = engine
        self.roster = roster
        self.pulse = pulse
        self.watch = watch
        self.limit = PassLimit()

    def run(self, gang: Sequence[Riding]) -> int:
        """What trains and what evaluates; the tokens of the passes that went well."""
        riding = sorted(gang, key=lambda r: (r.resident.is_suspect, not r.works[0].is_training))
        seats = deque(Seat(r.resident, work) for r in riding for work in r.works)
        failed: set[str] = set()
        done = 0
        while a_pass := self._next(seats, failed):
            self.pulse.beat()
            done += self._try(a_pass, failed)
        return done

    def _next(self, seats: deque[Seat], failed: set[str]) -> list[Seat]:
        """The first of the seats left that ride together; none of a run that has failed in this gang."""
        a_pass: list[Seat] = []
        tokens = 0
        while seats:
            seat = seats[0]
            if seat.resident.run_id in failed:
                seats.popleft()
                continue
            tokens += seat.work.num_tokens
            if a_pass and (seat.resident.is_suspect or tokens > self.limit.tokens):
                break
            a_pass.append(seats.popleft())
            if seat.resident.is_suspect:
                break
        return a_pass

    def _try(self, a_pass: Sequence[Seat], failed: set[str]) -> int:
        """Its tokens if it went well, else 0; adds the runs that cannot go on in this gang to `failed`."""
        try:
            outcomes = self._outcomes(a_pass)
        except OSError:  # the machine's fault, and no row's: the daemon begins anew
            raise
        except Exception as error:
            log.exception("pass_failed")
            if len(a_pass) == 1:
                self._blame(a_pass[0], error)
            else:
                self._begin_anew(a_pass, error)
            failed |= {seat.resident.run_id for seat in a_pass}
            return 0
        self.limit.fitted()
        for run_id, group in groupby(zip(a_pass, outcomes, strict=True), key=lambda pair: pair[0].resident.run_id):
            seats, mine = zip(*group, strict=True)
            try:
                seats[0].resident.program.took([seat.work for seat in seats], mine)
            except Diverged as error:
                failed.add(run_id)
                self.roster.end_diverged(seats[0].resident, error.works)
        return sum(seat.work.num_tokens for seat in a_pass)

    def _outcomes(self, a_pass: Sequence[Seat]) -> list[Outcome]:
        """A forward, with its backward of what trains, which comes first."""
        fault("pass.begin", [seat.resident.job.name for seat in a_pass])
        microbatches = [seat.resident.program.microbatch(seat.work, seat.resident.run) for seat in a_pass]
        num_trained = sum(seat.work.is_training for seat in a_pass)
        with self.watch.running():
            trained, evaluated = self.engine.compute(microbatches[:num_trained], microbatches[num_trained:])
        return [*trained, *evaluated]

    def _begin_anew(self, a_pass: Sequence[Seat], error: Exception) -> None:
        no_memory = is_out_of_memory(error)
        if no_memory:
            self.limit.failed(sum(seat.work.num_tokens for seat in a_pass))
        for resident in {seat.resident.run_id: seat.resident for seat in a_pass}.values():
            resident.begin_unit_anew(is_suspect=not no_memory)

    def _blame(self, seat: Seat, error: Exception) -> None:
        """End the job of a microbatch that fails by itself."""
        if not is_out_of_memory(error):
            message = f"The engine could not compute this job's rows ({type(error).__name__}). Look at the data."
            self.roster.fail(seat.resident, "pass_failed", message)
            return
        asked = bytes_asked(error)
        missing = "" if asked is None else f": the last request was for {asked} bytes"
        self.roster.fail(
            seat.resident,
            "out_of_memory",
            f"One microbatch, of {seat.work.num_tokens} tokens, does not fit into memory beside this job's "
            f"{seat.resident.run.bytes} bytes{missing}. Use shorter rows, fewer experts or a smaller rank.",
        )
        self.limit = PassLimit()  # it may have been the reason for the passes that failed before
