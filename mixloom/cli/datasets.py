"""`datasets …`; alone, it lists them."""

from pathlib import Path
from typing import Annotated

import typer

from mixloom.cli.names import ColumnOption, pairs_of
from mixloom.cli.output import (
    JsonFlag,
    moment,
    note,
    print_done,
    print_json,
    print_json_line,
    print_object,
    print_table,
    say,
)
from mixloom.client import Client
from mixloom.transport import Object

app = typer.Typer(help="Your data sets: list, upload, fetch, look at, delete.", invoke_without_command=True)

DatasetArgument = Annotated[str, typer.Argument(metavar="DATASET", help="Its id, ds_….")]


@app.callback()
def list_datasets(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, help="Most to list, the newest first.")] = 20,
    as_json: JsonFlag = False,
) -> None:
    if context.invoked_subcommand:
        return
    found = Client().datasets.list(limit)
    if as_json:
        print_json(found)
        return
    columns = ["id", "name", "status", "rows"]
    print_table(
        [*columns, "tokens", "created"],
        ([*(one[key] for key in columns), one["tokens"]["total"], moment(one["created_at"])] for one in found),
    )


@app.command()
def upload(
    file: Annotated[Path, typer.Argument(help="JSONL, CSV or Parquet.")],
    name: Annotated[str | None, typer.Option(help="Default: the file's name.")] = None,
    column: ColumnOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Upload a file of rows."""
    _print_new(Client().datasets.upload(file, name=name, columns=pairs_of(column, "--column") or None), as_json)


@app.command()
def fetch(
    hub: Annotated[str, typer.Argument(metavar="ORG/NAME", help="A data set on the hub.")],
    config: Annotated[str | None, typer.Option(help="Which of its configurations.")] = None,
    split: Annotated[str | None, typer.Option(help="Which of its splits.")] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, a tag or a commit.")] = None,
    column: ColumnOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Let the server fetch a data set from the hub."""
    columns = pairs_of(column, "--column") or None
    dataset = Client().datasets.from_hub(hub, config=config, split=split, revision=revision, columns=columns)
    _print_new(dataset, as_json)


@app.command()
def show(dataset: DatasetArgument, as_json: JsonFlag = False) -> None:
    """Show one data set."""
    print_object(Client().datasets.get(dataset), as_json)


@app.command()
def rows(
    dataset: DatasetArgument,
    limit: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
) -> None:
    """Print its first rows, a JSON object a line."""
    for row in Client().datasets.rows(dataset, limit):
        print_json_line(row)


@app.command()
def download(dataset: DatasetArgument, output: Annotated[Path, typer.Option("--output", "-o")]) -> None:
    """Save the file as it was uploaded."""
    say(str(Client().datasets.content(dataset, output)))


@app.command()
def delete(dataset: DatasetArgument, as_json: JsonFlag = False) -> None:
    """Delete a data set; jobs that were submitted with it keep their tokens."""
    print_done(Client().datasets.delete(dataset), as_json, f"{dataset} is deleted.")


def _print_new(dataset: Object, as_json: bool) -> None:
    if as_json:
        print_json(dataset)
    else:
        say(dataset["id"])
        note(f"{dataset['rows']} rows, {dataset['tokens']['total']} tokens.")
