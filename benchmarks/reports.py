"""A benchmark's report, for programs."""

import json
from pathlib import Path
from typing import Any


def write_json(report: dict[str, Any], file: Path | None) -> None:
    """What `--json FILE` asks for; nothing without it."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
