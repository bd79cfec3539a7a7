"""The commands of the server side. They become `python -m server …`, with their arguments as they came."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import typer

import mixloom
from mixloom.cli.output import usage_error

NEEDED = ("fastapi", "sqlalchemy", "torch", "transformers")
"""A few of the packages that `mixloom[server]` brings; looked for, never imported here."""

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def server_command(*arguments: str) -> list[str]:
    """The command line of the server that came with this client, whatever lies in the current folder."""
    return [sys.executable, "-P", "-m", "server", *arguments]


def server_environment() -> dict[str, str]:
    """The environment in which `server_command` finds its modules, even in a checkout not installed."""
    home = str(Path(mixloom.__file__).parents[1])
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def need_server_packages(command: str) -> None:
    """Refuse a command that this installation lacks the packages for."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise usage_error(
            f"`mixloom {command}` needs the server's packages ({', '.join(missing)} not found): "
            "pip install 'mixloom[server]'."
        )


def _become(verb: str, context: typer.Context) -> None:
    need_server_packages(verb)
    arguments = [*verb.split(), *context.args]
    os.execve(sys.executable, server_command(*arguments), server_environment())


def serve(context: typer.Context) -> None:
    """Run the server: the API and its engine daemon. `mixloom serve --help` lists the flags."""
    _become("serve", context)


def api(context: typer.Context) -> None:
    """Run the API process alone."""
    _become("api", context)


def daemon(context: typer.Context) -> None:
    """Run the engine daemon alone."""
    _become("daemon", context)


def config(context: typer.Context) -> None:
    """Print the server's settings, each with its source and default."""
    _become("config", context)


def doctor(context: typer.Context) -> None:
    """Name all that does not fit together in the server's tables and files. Exit code 1 if there is anything.

    It runs on the server's machine, whether or not the server does, and takes its settings (--data-dir) and --json.
    """
    _become("doctor", context)


def backup(context: typer.Context) -> None:
    """Copy the server's data to a folder while it runs: `mixloom admin backup DIR`. Again, it copies what is new.

    It runs on the server's machine, and takes its settings (--data-dir) and --json.
    """
    _become("backup", context)


def restore(context: typer.Context) -> None:
    """Make a data directory, which must be empty, of a backup: `mixloom admin restore DIR --data-dir NEW`.

    With PostgreSQL also the rows of a database, which must be empty too.
    """
    _become("restore", context)


def upgrade(context: typer.Context) -> None:
    """Bring the database to this version's schema (the server also does it at start)."""
    _become("db upgrade", context)
