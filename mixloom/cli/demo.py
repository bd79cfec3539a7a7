"""`demo`."""

from pathlib import Path
from typing import Annotated

import typer

from mixloom.cli.server import need_server_packages
from mixloom.demo.show import run


def demo(
    folder: Annotated[Path, typer.Option("--dir", help="Where everything goes.")] = Path("mixloom-demo"),
    keep_running: Annotated[
        bool, typer.Option("--keep-running", help="At the end leave the server running, until Ctrl-C.")
    ] = False,
) -> None:
    """See it work: two tenants train four adapters at once on a real language model, on this machine."""
    need_server_packages("demo")
    raise typer.Exit(run(folder, keep_running=keep_running))
