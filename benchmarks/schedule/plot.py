"""The plot of docs/scheduling.md."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.schedule.report import CURVE


def draw_plot(report: dict[str, Any], file: Path) -> None:
    """How many jobs are slowed down by how much, with the flooder (solid) and without (dotted)."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for policy, both in report["policies"].items():
        (line,) = axes.loglog(both["with"]["slowdown_curve"], CURVE, label=policy)
        axes.loglog(both["without"]["slowdown_curve"], CURVE, color=line.get_color(), linestyle=":")
    axes.set_xlabel("slowdown: from arrival to end ÷ time alone on the machine")
    axes.set_ylabel("part of jobs that are slower")
    axes.set_title("Jobs of all but the flooder; dotted: without the flooder")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
