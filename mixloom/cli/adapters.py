"""`adapters …`; alone, it lists them."""

from pathlib import Path
from typing import Annotated

import typer

from mixloom.cli.output import JsonFlag, moment, note, print_fields, print_json, print_table, say
from mixloom.client import Client

app = typer.Typer(help="Your adapters: list, look at, download, delete.", invoke_without_command=True)

AdapterArgument = Annotated[str, typer.Argument(metavar="ADAPTER", help="Its id, adp_….")]


@app.callback()
def list_adapters(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, help="Most to list, the newest first.")] = 20,
    as_json: JsonFlag = False,
) -> None:
    if context.invoked_subcommand:
        return
    found = Client().adapters.list(limit)
    if as_json:
        print_json(found)
        return
    columns = ["id", "name", "method", "bytes", "created_at"]
    print_table(columns, ([moment(one[key]) if key == "created_at" else one[key] for key in columns] for one in found))


@app.command()
def show(adapter: AdapterArgument, as_json: JsonFlag = False) -> None:
    """Show one adapter."""
    found = Client().adapters.get(adapter)
    if as_json:
        print_json(found)
    else:
        print_fields({**found, "created_at": moment(found["created_at"])})


@app.command()
def files(adapter: AdapterArgument, as_json: JsonFlag = False) -> None:
    """List its files."""
    found = Client().adapters.files(adapter)
    if as_json:
        print_json(found)
    else:
        print_table(["name", "bytes", "sha256"], ([one["name"], one["bytes"], one["sha256"]] for one in found))


@app.command()
def download(
    adapter: AdapterArgument,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The zip file, or a folder for it.")] = None,
    format: Annotated[str | None, typer.Option(help="native (default), peft or mixlora.")] = None,
) -> None:
    """Save all of it as a zip file."""
    say(str(Client().adapters.download(adapter, output, format=format)))


@app.command()
def delete(adapter: AdapterArgument, as_json: JsonFlag = False) -> None:
    """Delete an adapter."""
    answer = Client().adapters.delete(adapter)
    if as_json:
        print_json(answer)
    else:
        note(f"{adapter} is deleted.")
