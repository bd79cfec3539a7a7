"""What commands take as arguments, in the words of a person: which server, which job."""

from typing import Annotated

import typer

from mixloom.cli.output import usage_error
from mixloom.client import Client
from mixloom.stored import last_job
from mixloom.transport import Object

JobArgument = Annotated[
    str,
    typer.Argument(metavar="JOB", help="An id, the beginning of one, a name, or @last (the last one submitted)."),
]
JobsArgument = Annotated[
    list[str],
    typer.Argument(metavar="JOB...", help="Ids, beginnings of ids, names, or @last (the last one submitted)."),
]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="ROLE=COLUMN",
        help="Which column of the file is what: --column prompt=question --column completion=answer.",
    ),
]


def job_of(client: Client, reference: str) -> Object:
    """The job that a person means."""
    if reference != "@last":
        return client.jobs.find(reference)
    id_ = last_job(client.url)
    if id_ is None:
        raise usage_error(f"No job was submitted to {client.url} from this machine yet; give an id or a name.")
    return client.jobs.get(id_)


def pairs_of(options: list[str] | None, flag: str) -> dict[str, str]:
    """`["a=b", …]` as a dict."""
    pairs = {}
    for option in options or []:
        key, equals, value = option.partition("=")
        if not equals or not key or not value:
            raise usage_error(f"{flag} takes NAME=VALUE, got '{option}'.")
        pairs[key] = value
    return pairs
