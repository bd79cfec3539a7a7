"""What the benchmarks have in common at their ends: options that are read and reports that are written."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.errors import BenchmarkError
from engine.errors import EngineError

Report = dict[str, Any]
"""As it is written to JSON."""


def command(
    options: argparse.Namespace,
    measure: Callable[[argparse.Namespace, Console], Report],
    show: Callable[[Report, Console], None],
) -> int:
    """Measure, show the report and write the JSON; the exit code, 2 where the options ask for what cannot be."""
    console = Console()
    try:
        report = measure(options, console)
    except (BenchmarkError, EngineError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    show(report, console)
    write_json(report, options.json)
    return 0


def write_json(report: Report, file: Path | None) -> None:
    """What `--json FILE` asks for; nothing without it."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def positive(text: str) -> int:
    """An option that counts something."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value
