"""`login` and `me`."""

import sys
from typing import Annotated

import typer

from mixloom.cli.output import JsonFlag, note, print_object, usage_error
from mixloom.client import Client
from mixloom.stored import save_login


def login(
    url: Annotated[str, typer.Argument(help="The server, for example http://127.0.0.1:8000.")],
    key_stdin: Annotated[bool, typer.Option("--key-stdin", help="Read the key from stdin, not from a prompt.")] = False,
) -> None:
    """Remember a server and your key for it, once the server has taken the key."""
    if not url.startswith(("http://", "https://")):
        raise usage_error(f"A URL begins with http:// or https://, got '{url}'.")
    key = sys.stdin.readline() if key_stdin else typer.prompt("Key", hide_input=True, err=True)
    key = key.strip()
    if not key:
        raise usage_error("The key is empty; your operator makes one with `mixloom admin key add TENANT`.")
    who = _who(Client(url, key))
    path = save_login(url, key)
    note(f"Logged in to {url} as {who}; kept in {path}, readable by you alone.")


def me(as_json: JsonFlag = False) -> None:
    """Whose key is in use, and where."""
    client = Client()
    print_object({"server": client.url, **client.me()}, as_json)


def _who(client: Client) -> str:
    """The name behind a key. Raises `MixloomError` when the server does not know it."""
    tenant = client.me()["tenant"]
    return f"tenant '{tenant['name']}'" if tenant else "the operator"
