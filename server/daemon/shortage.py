"""Runs that wait for bytes: the books say so, and who could never have them here holds up no others of its tenant."""

from scheduler.admission import Wait
from scheduler.plan import Plan
from scheduler.snapshot import Snapshot, WaitingRun
from server.daemon.books import Books
from server.daemon.roster import Roster
from server.db import daemons, runs


class Shortage:
    """Which runs of a base wait for bytes, as one daemon sees it."""

    def __init__(self, books: Books, base_hash: str, roster: Roster):
        self.books = books
        self.base_hash = base_hash
        self.roster = roster
        self._noted: set[str] | None = None  # runs, as last written; None: not known
        self._too_large: dict[str, WaitingRun] = {}  # for this machine; they wait

    @property
    def passed_over(self) -> list[int]:
        """Numbers of the jobs that are too large for this machine."""
        return [run.order for run in self._too_large.values()]

    def forget(self) -> None:
        """Another daemon came or went: it may have noted otherwise."""
        self._noted = None

    def note(self, snapshot: Snapshot, decision: Plan, *, has_company: bool) -> None:
        """Write who waits for bytes by this plan. Who could never have them ends, unless another daemon may have them.

        Until then, or where it was in memory before, it is passed over.
        """
        waiting = [one.waiting for one in snapshot.tenants if one.waiting is not None]
        self._too_large |= {run.run_id: run for run in waiting if decision.waits.get(run.run_id) is Wait.TOO_LARGE}
        if self._too_large:
            with self.books.glance() as reader:
                queued = runs.queued(reader, self._too_large)
            self._too_large = {run_id: self._too_large[run_id] for run_id in queued}
            new = [run for run in self._too_large.values() if not queued[run.run_id]]
            for run in new if new and not self._may_fit_elsewhere() else ():
                self.roster.refuse(run, snapshot)
        short = {run_id for run_id, wait in decision.waits.items() if wait is Wait.MEMORY} | self._too_large.keys()
        if short != self._noted or (short and has_company and not self._is_noted(short)):
            with self.books.write() as session:
                runs.tell_short_of_bytes(session, self.base_hash, short, before=self._noted)
            self._noted = short

    def _may_fit_elsewhere(self) -> bool:
        with self.books.read() as session:
            return daemons.others_of_base(session, self.base_hash, epoch=self.books.epoch, name=self.books.name)

    def _is_noted(self, short: set[str]) -> bool:
        """Whether the books still have what was written: another daemon may have said of the same run that it fits."""
        with self.books.glance() as reader:
            return runs.is_told_short_of_bytes(reader, short)
