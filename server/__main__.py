"""`python -m server VERB --flag value …`: what the commands of `mixloom` that need no server run."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from server import garbage
from server.errors import MixloomError
from server.settings import Settings
from server.store import LocalStore

VERBS = {
    "serve": "Run the API and, as a supervised child, the engine daemon.",
    "api": "Run the API alone.",
    "daemon": "Run the engine daemon alone.",
    "config": "Print every setting with its source and default.",
    "doctor": "Look for what does not fit together in the database and the files.",
    "backup": "Copy the data directory and the database while the server runs.",
    "restore": "Make a data directory and a database of a backup.",
    "db": "`db upgrade` brings the database to this version's schema.",
}
UPKEEP = ("doctor", "backup", "restore")
"""They need no running server, nor do they disturb one."""
INTERRUPTED = 130


def main(arguments: list[str]) -> int:
    """Run a verb; the exit code: 2 for a bad setting, 1 for a failure with one sentence on stderr, 130 for Ctrl-C."""
    parser = _parser()
    parsed = vars(parser.parse_args(arguments))
    verb, supervisor = parsed.pop("verb"), parsed.pop("supervisor", None)
    parsed.pop("action", None)
    folder, as_json = parsed.pop("folder", None), parsed.pop("json", False)
    flags = {name: value for name, value in parsed.items() if value is not None}
    try:
        settings = Settings(**flags)
        if verb in UPKEEP:
            return _upkeep(verb, settings, folder, as_json)
        return _run(verb, settings, flags, supervisor)
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
    except KeyboardInterrupt:  # before there was anything to end in order
        return INTERRUPTED


def _run(verb: str, settings: Settings, flags: dict[str, Any], supervisor: str | None) -> int:
    if verb == "config":
        for name, value, source, description in settings.with_sources(flags):
            print(f"{name} = {value}  ({source})  {description}")
        return 0
    if verb == "db":
        from server.db.migrate import upgrade

        upgrade(settings)
        return 0
    if verb == "daemon":
        with garbage.loading():
            from server.daemon import main as daemon

        return daemon.main(settings, supervisor=supervisor)
    with garbage.loading():
        from server.serve import serve

    child_flags = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return serve(settings, child_flags, with_daemon=verb == "serve")


def _upkeep(verb: str, settings: Settings, folder: Path | None, as_json: bool) -> int:
    """A verb on the files and the tables as they lie there; the exit code: 1 where something is not as it must be."""
    from server import backup, doctor

    answer: dict[str, Any] = {}
    if verb == "doctor":
        findings = doctor.examine(doctor.open_as_it_is(settings), LocalStore(settings.data_dir))
    else:
        assert folder is not None
        copied = (backup.back_up if verb == "backup" else backup.restore)(settings, folder)
        answer = {"folders": copied.folders, "new": copied.new, "removed": copied.removed}
        findings = copied.findings
    if as_json:
        print(json.dumps({**answer, "findings": [finding.as_dict() for finding in findings]}, indent=2))
    else:
        for finding in findings:
            print(f"{finding.kind}  {finding.id}  {finding.message}")
        counts = "".join(f"{number} {name}, " for name, number in answer.items())
        print(f"{counts}{len(findings)} findings", file=sys.stderr)
    return 1 if findings else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mixloom", description="The server side of Mixloom.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, description in VERBS.items():
        sub = verbs.add_parser(verb, help=description, description=description)
        if verb == "db":
            sub.add_argument("action", choices=["upgrade"])
        if verb in UPKEEP:
            sub.add_argument("--json", action="store_true", help="Print JSON, for programs.")
        if verb in ("backup", "restore"):
            sub.add_argument("folder", type=Path, metavar="DIR", help="Of the backup.")
        if verb == "daemon":
            sub.add_argument("--supervisor", help=argparse.SUPPRESS)
        for name, field in Settings.model_fields.items():
            if name == "admin_key":  # never on a command line, where every user of the machine reads it
                continue
            choices = [str(choice) for choice in get_args(field.annotation) if isinstance(choice, str)]
            text = f"{field.description or ''} (default: {field.default})".replace("%", "%%").strip()
            sub.add_argument(f"--{name.replace('_', '-')}", choices=choices or None, help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
