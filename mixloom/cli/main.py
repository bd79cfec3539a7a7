"""The command `mixloom`: the list of all commands, and how every failure ends."""

import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from mixloom.cli import adapters, admin, datasets, jobs, server
from mixloom.cli.demo import demo
from mixloom.cli.generate import generate
from mixloom.cli.login import login, me
from mixloom.cli.output import INTERRUPTED, USAGE, note, report
from mixloom.cli.submit import estimate, submit
from mixloom.errors import MixloomError

EXIT_CODES = """Exit codes: 0 done; 1 a job failed or was cancelled; 2 wrong usage; 3 no server answers; \
4 the server refused (4xx); 5 the server failed (5xx); 130 interrupted."""

SERVER, WORK = "Server", "Work"

app = typer.Typer(
    help="Fine-tune many adapters at once on one frozen base model.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _add(parent: typer.Typer, panel: str | None, *commands: Callable[..., None], **settings: Any) -> None:
    for command in commands:
        parent.command(rich_help_panel=panel, **settings)(command)


CHILD = {"context_settings": server.PASS_ON, "add_help_option": False}
database = typer.Typer(help="The server's database.", no_args_is_help=True)
_add(database, None, server.upgrade, **CHILD)

_add(app, SERVER, server.serve, server.api, server.daemon, server.config, **CHILD)
_add(app, SERVER, demo)
_add(admin.app, None, server.doctor, server.backup, server.restore, **CHILD)
app.add_typer(admin.app, name="admin", rich_help_panel=SERVER)
app.add_typer(database, name="db", rich_help_panel=SERVER)

_add(app, WORK, login, me, submit, estimate, jobs.jobs, jobs.show, jobs.watch, jobs.wait, jobs.logs)
_add(app, WORK, jobs.experts, jobs.cancel, jobs.pause, jobs.resume, jobs.download, generate)
app.add_typer(datasets.app, name="datasets", rich_help_panel=WORK)
app.add_typer(adapters.app, name="adapters", rich_help_panel=WORK)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            print(f"mixloom {version('mixloom')}")
        except PackageNotFoundError:
            print("mixloom, from a checkout that was not installed")
        raise typer.Exit()


@app.callback()
def root(
    print_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run one command; every failure is one sentence on stderr and an exit code, never a traceback."""
    try:
        app()
    except MixloomError as error:
        sys.exit(report(error))
    except OSError as error:  # a file of the user's that cannot be read or written
        note(f"error: {error.strerror or error}: {error.filename}" if error.filename else f"error: {error}")
        sys.exit(USAGE)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
