"""A child process of the API: `python -m server.daemon.export SOURCE TARGET FORMAT` writes an adapter's files anew."""

import sys
from pathlib import Path

from engine import formats
from engine.errors import EngineError


def main() -> None:
    """Exit 0 with the files in TARGET, or 1 with one sentence on stderr."""
    source, target, layout = sys.argv[1:]
    try:
        formats.export(Path(source), Path(target), layout)
    except EngineError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
