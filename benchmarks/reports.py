"""What the benchmarks have in common at their ends: options that are read and reports that are written."""

import argparse
import json
from pathlib import Path
from typing import Any


def write_json(report: dict[str, Any], file: Path | None) -> None:
    """What `--json FILE` asks for; nothing without it."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def positive(text: str) -> int:
    """An option that counts something."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value
