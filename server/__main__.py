"""`python -m server VERB --flag value …`: what `mixloom serve`, `api`, `daemon`, `config` and `db upgrade` run."""

import argparse
import sys
from typing import Any, get_args

from pydantic import ValidationError

from server.errors import MixloomError
from server.settings import Settings

VERBS = {
    "serve": "Run the API and, as a supervised child, the engine daemon.",
    "api": "Run the API alone.",
    "daemon": "Run the engine daemon alone.",
    "config": "Print every setting with its source and default.",
    "db": "`db upgrade` brings the database to this version's schema.",
}


def main(arguments: list[str]) -> int:
    """Run a verb; the exit code: 2 for a bad setting, 1 for a failure with one sentence on stderr."""
    parser = _parser()
    parsed = vars(parser.parse_args(arguments))
    verb, supervised = parsed.pop("verb"), parsed.pop("supervised", False)
    parsed.pop("action", None)
    flags = {name: value for name, value in parsed.items() if value is not None}
    try:
        settings = Settings(**flags)
        return _run(verb, settings, flags, supervised)
    except ValidationError as error:
        for problem in error.errors():
            name = str(problem["loc"][0]) if problem["loc"] else "settings"
            unknown = problem["type"] == "extra_forbidden"
            message = "mixloom.toml has no such setting" if unknown else problem["msg"].removeprefix("Value error, ")
            print(f"mixloom: {name}: {message}. `mixloom config --help` lists the settings.", file=sys.stderr)
        return 2
    except MixloomError as error:
        print(f"mixloom: {error.message}", file=sys.stderr)
        return 1


def _run(verb: str, settings: Settings, flags: dict[str, Any], supervised: bool) -> int:
    if verb == "config":
        for name, value, source, description in settings.with_sources(flags):
            print(f"{name} = {value}  ({source})  {description}")
        return 0
    if verb == "db":
        from server.db.migrate import upgrade

        upgrade(settings)
        return 0
    if verb == "daemon":
        from server.daemon import main as daemon

        return daemon.main(settings, supervised=supervised)
    from server.serve import serve

    child_flags = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return serve(settings, child_flags, with_daemon=verb == "serve")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mixloom", description="The server side of Mixloom.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, description in VERBS.items():
        sub = verbs.add_parser(verb, help=description, description=description)
        if verb == "db":
            sub.add_argument("action", choices=["upgrade"])
        if verb == "daemon":
            sub.add_argument("--supervised", action="store_true", help=argparse.SUPPRESS)
        for name, field in Settings.model_fields.items():
            if name == "admin_key":  # never on a command line, where every user of the machine reads it
                continue
            choices = [str(choice) for choice in get_args(field.annotation) if isinstance(choice, str)]
            text = f"{field.description or ''} (default: {field.default})".replace("%", "%%").strip()
            sub.add_argument(f"--{name.replace('_', '-')}", choices=choices or None, help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
