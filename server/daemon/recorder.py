"""What a gang came to, in the books: the steps and means that ended, whom they acquit, what everybody is charged."""

import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sqlalchemy.orm import Session

from scheduler.plan import Plan
from server.daemon.books import Books
from server.daemon.passes import Riding
from server.daemon.program import Evaluation, StepReport
from server.daemon.roster import Resident, Roster
from server.db import accounts, runs, seats
from server.db.runs import StepRow
from server.faults import fault


@dataclass
class Ended:
    """The steps and evaluations that a gang brought to their end."""

    steps: list[tuple[Resident, StepReport]] = field(default_factory=list)
    evaluations: list[tuple[Resident, Evaluation]] = field(default_factory=list)
    without_room: list[tuple[Resident, Exception]] = field(default_factory=list)  # that had no memory for their step

    @property
    def residents(self) -> list[Resident]:
        return [*(step[0] for step in self.steps), *(one[0] for one in self.evaluations)]


class Recorder:
    """Writes each gang in one transaction. Knows what its life wrote last, and decides nothing."""

    def __init__(self, books: Books, roster: Roster):
        self.books = books
        self.roster = roster
        self.num_gangs = 0
        self._backlogged: frozenset[str] | None = None  # as last written; None: not known
        with books.read() as session:
            self.floor = seats.floor(session, books.seat)

    def record(self, decision: Plan, gang: Sequence[Riding], ended: Ended, detail: Mapping[str, object]) -> None:
        """A plan, what came of its gang, and with it `detail` of the daemon; of a plan without a gang what is new."""
        if not gang:
            if decision.backlogged != self._backlogged or decision.rises:
                with self.books.write() as session:
                    self._charge(session, decision, ended)
                self._backlogged = decision.backlogged
            return
        self.num_gangs += 1
        fault("record.begin")
        rows = [_step_row(*step, gang=self.num_gangs, gang_jobs=len(gang)) for step in ended.steps]
        with self.books.write(floor=decision.floor, detail={**detail, "gangs": self.num_gangs}) as session:
            runs.add_steps(session, rows, self.books.epoch)
            for resident, evaluation in ended.evaluations:
                runs.add_evaluation(session, resident.job, self.books.epoch, **vars(evaluation))
            runs.acquit(session, _acquitted(ended))
            self._charge(session, decision, ended)
        fault("record.end")
        self.floor, self._backlogged = decision.floor, decision.backlogged

    def forget_backlogged(self) -> None:
        """Runs came into memory: one that lost work has marked its tenant."""
        self._backlogged = None

    def _charge(self, session: Session, decision: Plan, ended: Ended) -> None:
        """Write the plan's increments, and give back what others have made fail; meter the steps that are taken."""
        costs = Counter({slot.run_id: slot.cost for slot in decision.gang})
        run_rises, refunds = defaultdict(float, decision.run_rises), Counter[str]()
        for resident in (one for one in self.roster.residents.values() if one.refund):
            costs[resident.run_id] -= resident.refund
            run_rises[resident.run_id] -= resident.refund / resident.job.weight
            refunds[resident.job.tenant_id] += resident.refund
            resident.refund = 0
        trained = Counter[str]()
        for resident, report in ended.steps:
            trained[resident.job.tenant_id] += report.step_tokens
        accounts.charge(
            session,
            self.books.seat,
            rises=decision.rises,
            run_rises=run_rises,
            costs=costs,
            refunds=refunds,
            trained=trained,
        )
        if decision.backlogged != self._backlogged:
            accounts.set_backlogged(session, self.books.seat, decision.backlogged)


def _acquitted(ended: Ended) -> list[str]:
    """The runs that have got further than where a daemon died that held them."""
    passed = [
        resident
        for resident, report in ended.steps
        if resident.crash_step is not None and report.step > resident.crash_step
    ]
    for resident in passed:
        resident.crash_step, resident.is_on_trial = None, False
    return [resident.run_id for resident in passed]


def _step_row(resident: Resident, report: StepReport, *, gang: int, gang_jobs: int) -> StepRow:
    now = time.monotonic()
    rate = report.step_tokens / max(now - resident.step_began, 1e-6)
    resident.step_began = now
    metric = vars(report) | {"tokens_per_second": rate, "gang": gang, "gang_jobs": gang_jobs}
    del metric["step_tokens"], metric["expert_loads"]
    return StepRow(resident.job.id, metric, report.expert_loads)
