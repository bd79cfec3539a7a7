"""`adapters …`; alone, it lists them."""

from pathlib import Path
from typing import Annotated

import typer

from mixloom.cli.output import JsonFlag, moment, note, print_done, print_json, print_object, print_table, say
from mixloom.client import Client

app = typer.Typer(help="Your adapters: list, upload, look at, download, delete.", invoke_without_command=True)

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
    columns = ["id", "name", "method", "bytes"]
    print_table(
        [*columns, "created"],
        ([*(one[key] for key in columns), moment(one["created_at"])] for one in found),
    )


@app.command()
def upload(
    folder: Annotated[Path, typer.Argument(help="With adapter_config.json and adapter_model.safetensors.")],
    name: Annotated[str | None, typer.Option(help="Default: the folder's name.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Upload an adapter that HF PEFT or the package mixlora saved: to start jobs from, or to ask."""
    adapter = Client().adapters.upload(folder, name=name)
    if as_json:
        print_json(adapter)
        return
    say(adapter["id"])
    for warning in adapter["warnings"]:
        note(warning)


@app.command()
def show(adapter: AdapterArgument, as_json: JsonFlag = False) -> None:
    """Show one adapter."""
    print_object(Client().adapters.get(adapter), as_json)


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
    print_done(Client().adapters.delete(adapter), as_json, f"{adapter} is deleted.")
