"""Outcomes as figures, and figures as tables."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.schedule.policies import POLICIES
from benchmarks.schedule.simulation import Outcome, Simulation
from benchmarks.schedule.timing import PASS_TOKENS, Timing
from benchmarks.schedule.workload import (
    ADVERSARY,
    FLOODER,
    NUM_SMALL,
    SMALL_SHARES,
    Workload,
    beside_an_adversary,
    small,
)

CURVE = np.logspace(0, -4, 41)
"""Parts of all jobs, from all to one of ten thousand: for each, the slowdown that so many jobs exceed."""
ADVERSARYS_TIME = 500_000.0
"""Some hundred gangs."""


def figures(workload: Workload, outcome: Outcome, timing: Timing) -> dict[str, Any]:
    """One policy on one workload. Waits, in seconds, and slowdowns are those of all jobs that were not cancelled, but
    the flooder's.
    """
    owners = np.array([job.tenant for job in workload.jobs])
    slowdowns = outcome.stays / np.array([job.alone for job in workload.jobs])
    others, done = owners != FLOODER, ~np.isnan(outcome.stays)
    errors = outcome.share_errors if len(outcome.share_errors) else np.zeros(1)
    of_small = {share: np.isin(owners, [small(share, number) for number in range(NUM_SMALL)]) for share in SMALL_SHARES}
    time = sum(outcome.took.values())
    return {
        "gangs": outcome.num_gangs,
        "share_error": {"p99": float(np.percentile(errors, 99)), "max": float(errors.max()), "intervals": len(errors)},
        "fill": outcome.fill,
        "time_in_passes": outcome.num_gangs * PASS_TOKENS / (time + outcome.num_gangs * PASS_TOKENS),
        "wait_seconds": _percentiles(outcome.waits[others & done] * timing.seconds),
        "slowdown": _percentiles(slowdowns[others & done]),
        "slowdown_curve": [float(np.quantile(slowdowns[others & done], 1 - part)) for part in CURVE],
        "small": {f"{share:g}": _percentiles(slowdowns[mask]) for share, mask in of_small.items()},
        "flooder_time_over_share": outcome.took[FLOODER] / outcome.due[FLOODER] if FLOODER in outcome.due else None,
    }


def adversary_figures(timing: Timing, method: str, *, num_jobs: int, num_others: int) -> dict[str, Any]:
    """The time that jobs of batch 1, which save and evaluate at every step, take beside tenants of the same share."""
    workload = beside_an_adversary(
        timing, method, num_jobs=num_jobs, num_others=num_others, tokens=int(10 * ADVERSARYS_TIME)
    )
    outcome = Simulation(workload, POLICIES[0]).run(until=ADVERSARYS_TIME)
    return {
        "method": method,
        "jobs": num_jobs,
        "others": num_others,
        "time_over_share": outcome.took[ADVERSARY] / outcome.due[ADVERSARY],
        "fill": outcome.fill,
        "time_in_passes": outcome.num_gangs * PASS_TOKENS / ADVERSARYS_TIME,
    }


def print_tables(console: Console, report: dict[str, Any]) -> None:
    """What the report holds, for people."""
    for table in (_fairness(report), _waiting(report), _adversary(report)):
        console.print(table, highlight=False)


def _percentiles(values: NDArray[np.float64]) -> dict[str, float]:
    return {"p50": float(np.percentile(values, 50)), "p99": float(np.percentile(values, 99))}


def _fairness(report: dict[str, Any]) -> Table:
    of = report["settings"]
    rows = [
        [
            policy,
            *(f"{both['with']['share_error'][name]:.2f}" for name in ("p99", "max")),
            f"{both['with']['flooder_time_over_share']:.2f}",
            f"{both['with']['fill']:.1%}",
            f"{both['with']['time_in_passes']:.2%}",
        ]
        for policy, both in report["policies"].items()
    ]
    headings = ("scheduler", "share error ÷ bound, p99", "max", "flooder's time ÷ share", "fill", "time lost in passes")
    return _table(f"{of['tenants']} tenants, {of['jobs']} jobs, seed {of['seed']}", headings, rows)


def _waiting(report: dict[str, Any]) -> Table:
    rows = [
        [
            policy,
            flood,
            *(f"{one['wait_seconds'][name]:,.0f}" for name in ("p50", "p99")),
            *(f"{one['slowdown'][name]:,.1f}" for name in ("p50", "p99")),
            *(f"{one['small'][share]['p50']:,.1f}" for share in one["small"]),
        ]
        for policy, both in report["policies"].items()
        for flood, one in both.items()
    ]
    headings = (
        "scheduler",
        "flooder",
        "wait p50, s",
        "p99",
        "slowdown p50",
        "p99",
        "one small job: share 1",
        "share 10",
    )
    return _table("Jobs of all but the flooder", headings, rows)


def _adversary(report: dict[str, Any]) -> Table:
    rows = [
        [
            one["method"],
            str(one["jobs"]),
            f"{one['time_over_share']:.2f}",
            f"{one['fill']:.1%}",
            f"{one['time_in_passes']:.2%}",
        ]
        for one in report["adversary"]
    ]
    headings = ("adversary", "its jobs", "its time ÷ share", "fill", "time lost in passes")
    return _table("Batch 1, a checkpoint and an evaluation each step", headings, rows)


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return table
