"""How fair the scheduler is, and what that costs: a simulation of many tenants, against other schedulers.

No model and no server: the real `scheduler.plan` decides, gang by gang, and `simulation` keeps the books. How long
things take comes from `python -m benchmarks costs`.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from rich.console import Console

from benchmarks import machine
from benchmarks.reports import write_json
from benchmarks.schedule.policies import POLICIES, Policy
from benchmarks.schedule.report import adversary_figures, figures, print_tables
from benchmarks.schedule.simulation import Outcome, Simulation
from benchmarks.schedule.timing import Timing
from benchmarks.schedule.workload import FLOODER, Workload, draw

COSTS = Path(__file__).parents[1] / "results" / "2026-11-29-xeon-avx512-float32-costs.json"
"""The report that times come from unless another is named."""
ADVERSARYS_JOBS = (1, 12)
NUM_OTHERS = 3


def main(arguments: list[str]) -> int:
    """Simulate each policy, with and without the flooder; print the tables, write the JSON and the plot."""
    options = _parser().parse_args(arguments)
    costs = json.loads(options.costs.read_text(encoding="utf-8"))
    timing = Timing(costs)
    drawn = draw(timing, num_tenants=options.tenants, num_jobs=options.jobs, load=options.load, seed=options.seed)
    workloads = {"with": drawn, "without": drawn.without(FLOODER)}
    with ProcessPoolExecutor(options.processes) as pool:
        outcomes = {
            (policy, flood): pool.submit(simulate, workload, policy)
            for policy in POLICIES
            for flood, workload in workloads.items()
        }
        policies = {
            policy.name: {
                flood: figures(workload, outcomes[policy, flood].result(), timing)
                for flood, workload in workloads.items()
            }
            for policy in POLICIES
        }
    report = {
        "benchmark": "schedule",
        "machine": machine.describe("cpu"),
        "settings": {
            **{"tenants": options.tenants, "jobs": options.jobs, "seed": options.seed, "load": options.load},
            **{"base": costs["base"], "seconds_per_token_equivalent": timing.seconds},
        },
        "policies": policies,
        "adversary": [
            adversary_figures(timing, method, num_jobs=num_jobs, num_others=NUM_OTHERS)
            for method in timing.methods
            for num_jobs in ADVERSARYS_JOBS
        ],
    }
    print_tables(Console(), report)
    write_json(report, options.json)
    if options.plot:
        from benchmarks.schedule.plot import draw_plot

        draw_plot(report, options.plot)
    return 0


def simulate(workload: Workload, policy: Policy) -> Outcome:
    """In a process of its own."""
    return Simulation(workload, policy).run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks schedule", description=__doc__)
    parser.add_argument(
        "--tenants", type=int, default=1000, help="beside the flooder and those of one small job (1000)"
    )
    parser.add_argument("--jobs", type=int, default=100_000, help="of which a tenth is the flooder's (100000)")
    parser.add_argument("--load", type=float, default=0.8, help="of the machine, without the flooder's jobs (0.8)")
    parser.add_argument("--seed", type=int, default=1, help="of everything that is drawn (1)")
    parser.add_argument("--costs", type=Path, default=COSTS, help="a report of `python -m benchmarks costs`")
    parser.add_argument("--processes", type=int, help="simulations at once; else as many as there are cores")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    parser.add_argument("--plot", type=Path, help="also draw slowdowns to this file (needs matplotlib)")
    return parser
