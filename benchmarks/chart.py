"""The bar chart of `benchmarks paper`: every ratio to LoRA, ours beside the paper's."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

TITLES = {
    "forward": "forward",
    "backward": "backward",
    "training_memory": "memory a model,\ntraining",
    "inference": "inference",
    "inference_memory": "memory a model,\ninference",
}
HEIGHT = 0.4


def draw(report: dict[str, Any], labels: Mapping[str, str], circumstances: str, file: Path) -> None:
    """One panel a column of the table, one pair of bars a row. `labels`: of the contenders."""
    rows = report["rows"]
    figure = Figure(figsize=(13, 1.5 + 0.45 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(TITLES), sharey=True)
    for panel, column in zip(panels, TITLES, strict=True):
        for offset, key, label, colour in (
            (-HEIGHT / 2, "here_to_lora", f"here, {report['settings']['base']}", "tab:blue"),
            (HEIGHT / 2, "published_to_lora", f"paper, {report['published_base']}", "tab:gray"),
        ):
            places = [place for place, row in enumerate(rows) if row[key]]
            values = [rows[place][key][column] for place in places]
            bars = panel.barh([place + offset for place in places], values, HEIGHT, label=label, color=colour)
            panel.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
        panel.axvline(1, color="black", linewidth=0.6)
        panel.set_title(TITLES[column], fontsize=10)
        panel.margins(x=0.2)
    panels[0].set_yticks(
        range(len(rows)), [f"{labels[row['contender']]} x {row['models']}" for row in rows], fontsize=8
    )
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower right", ncols=2, fontsize=8)
    figure.suptitle("Ratio to one LoRA model; lower is better", fontsize=11)
    figure.supxlabel(textwrap.fill(circumstances, 190), fontsize=6, x=0.01, horizontalalignment="left")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
