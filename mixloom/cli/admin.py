"""`admin …`: the operator's commands. They need the admin key (`mixloom login` takes it as any other)."""

import re
import time
from collections.abc import Callable
from typing import Annotated

import typer

from mixloom.cli.output import (
    JsonFlag,
    moment,
    note,
    print_done,
    print_fields,
    print_json,
    print_object,
    print_table,
    say,
    usage_error,
)
from mixloom.client import Client
from mixloom.errors import MixloomError, ServerUnreachable
from mixloom.jobs import POLL_SECONDS
from mixloom.transport import Object, given

app = typer.Typer(help="Operate the server: tenants, keys, queue, drains.", no_args_is_help=True)
tenant = typer.Typer(help="Tenants; alone, it lists them.", invoke_without_command=True)
key = typer.Typer(help="Keys of a tenant.", no_args_is_help=True)
app.add_typer(tenant, name="tenant")
app.add_typer(key, name="key")

DAEMON_FIELDS = ("name", "state", "pid", "base_hash", "heartbeat_seconds_ago", "detail")
SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
AWAY = (502, 503, 504)
"""What the server, or a proxy before it, answers while it, or its database, is away."""
DaemonOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Only daemons of this name (see `mixloom admin status`).")
]
TenantArgument = Annotated[str, typer.Argument(metavar="TENANT", help="Its id, ten_…, or its name.")]


@app.command()
def drain(
    quick: Annotated[
        bool, typer.Option("--quick", help="Save every run at its next step, then rest (default).")
    ] = False,
    graceful: Annotated[bool, typer.Option("--graceful", help="Let the resident runs finish first.")] = False,
    fast: Annotated[bool, typer.Option("--fast", help="Stop now; runs go back to their last recovery point.")] = False,
    deadline: Annotated[
        str | None, typer.Option(metavar="30m", help="With --graceful: after this, quick. 90s, 30m, 2h.")
    ] = None,
    reason: Annotated[str, typer.Option(help="Shown to every tenant.")] = "",
    daemon: DaemonOption = None,
    wait: Annotated[bool, typer.Option("--wait", help="Return when every run is let go of.")] = False,
    exit: Annotated[
        bool, typer.Option("--exit", help="Let the daemon end when it rests; `serve` starts it again after undrain.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Bring training to rest, without losing anything. Holds until `admin undrain`, across restarts."""
    chosen = [mode for mode, wanted in (("quick", quick), ("graceful", graceful), ("fast", fast)) if wanted]
    if len(chosen) > 1:
        raise usage_error(f"A drain has one mode, got --{' and --'.join(chosen)}.")
    client = Client()
    answer = client.admin.drain(
        chosen[0] if chosen else "quick",
        deadline_seconds=None if deadline is None else _seconds(deadline),
        reason=reason,
        daemon=daemon,
        exit=exit,
    )
    while wait and not answer["at_rest"]:
        time.sleep(POLL_SECONDS)
        now = _patiently(client.admin.current_drain)
        ours = [one for one in (now, *now["named"]) if one.get("id") == answer["id"]]
        if not ours:
            message = "This drain was ended or replaced meanwhile; see `mixloom admin status`."
            raise MixloomError(message, code="drain_ended", status=404)
        (answer,) = ours
    undrain = "mixloom admin undrain" + ("" if daemon is None else f" --daemon {daemon}")
    print_done(answer, as_json, "Everything rests." if wait else f"Draining. `{undrain}` ends it.")


@app.command()
def undrain(daemon: DaemonOption = None, as_json: JsonFlag = False) -> None:
    """End the drain of all daemons, or that of one; it says which are still in force."""
    answer = Client().admin.undrain(daemon)
    still = ", ".join(one["daemon"] for one in answer["named"])
    if answer["draining"]:
        said = "A drain of all daemons is still in force."
    elif still:
        said = f"Training goes on but in {still}; `mixloom admin undrain --daemon NAME` lets one of these train again."
    else:
        said = "No drain is in force; training goes on."
    print_done(answer, as_json, said)


@app.command()
def status(as_json: JsonFlag = False) -> None:
    """Show whether the server can work, the drains in force and the live daemons."""
    client = Client()
    ready, in_force = client.ready(), client.admin.current_drain()
    live = [daemon for daemon in client.admin.daemons() if daemon["live"]]
    if as_json:
        print_json({**ready, "drain": in_force, "daemons": live})
        return
    print_fields(
        {
            "server": client.url,
            "status": ready["status"],
            "reasons": ready["reasons"],
            "drain": _in_words(in_force),
            **{f"drain of {one['daemon']}": _in_words(one) for one in in_force["named"]},
        }
    )
    for daemon in live:
        say("")
        fields = {field: daemon[field] for field in DAEMON_FIELDS}
        print_fields({"daemon": daemon["id"], **fields})


@app.command()
def queue(as_json: JsonFlag = False) -> None:
    """Show every tenant's jobs that have not ended, and what they wait for."""
    found = Client().admin.queue()
    if as_json:
        print_json(found)
        return
    print_table(
        ["job", "name", "tenant", "status", "priority", "step", "expected end", "waits"],
        (
            [
                entry["id"],
                entry["name"],
                entry["tenant"]["name"],
                entry["status"],
                entry["priority"],
                f"{entry['progress']['step']}/{entry['progress']['total_steps']}",
                moment(entry["estimated_finish"]),
                entry["sentence"],
            ]
            for entry in found
        ),
    )


@tenant.callback()
def list_tenants(context: typer.Context, as_json: JsonFlag = False) -> None:
    if context.invoked_subcommand:
        return
    found = Client().admin.tenants()
    if as_json:
        print_json(found)
    else:
        print_table(
            ["id", "name", "share", "created"],
            ([one["id"], one["name"], one["share"], moment(one["created_at"])] for one in found),
        )


@tenant.command()
def add(
    name: Annotated[str, typer.Argument(help="Unique.")],
    share: Annotated[float, typer.Option(help="Of the machine, relative to the others'.")] = 1.0,
    as_json: JsonFlag = False,
) -> None:
    """Make a tenant. Its first key is printed, once."""
    _print_with_key(Client().admin.create_tenant(name, share), as_json)


@tenant.command("set")
def change(
    tenant: TenantArgument,
    name: Annotated[str | None, typer.Option(help="A new name.")] = None,
    share: Annotated[float | None, typer.Option(help="A new share.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Change a tenant's name or share."""
    client = Client()
    changes = given(name=name, share=share)
    if not changes:
        raise usage_error("There is nothing to change; give --name or --share.")
    print_object(client.admin.change_tenant(_tenant_id(client, tenant), **changes), as_json)


@tenant.command()
def delete(tenant: TenantArgument, as_json: JsonFlag = False) -> None:
    """Delete a tenant: its keys stop working, its jobs are cancelled."""
    client = Client()
    print_done(client.admin.delete_tenant(_tenant_id(client, tenant)), as_json, f"{tenant} is deleted.")


@key.command("add")
def add_key(
    tenant: TenantArgument,
    name: Annotated[str, typer.Option(help="To tell it from the others.")] = "key",
    as_json: JsonFlag = False,
) -> None:
    """Make another key. It is printed, once."""
    client = Client()
    _print_with_key(client.admin.create_key(_tenant_id(client, tenant), name), as_json)


@key.command("list")
def list_keys(tenant: TenantArgument, as_json: JsonFlag = False) -> None:
    """List a tenant's keys, by their first characters."""
    client = Client()
    found = client.admin.keys(_tenant_id(client, tenant))
    if as_json:
        print_json(found)
        return
    print_table(
        ["id", "name", "shown", "created", "revoked"],
        ([one["id"], one["name"], one["shown"], moment(one["created_at"]), moment(one["revoked_at"])] for one in found),
    )


@key.command("revoke")
def revoke_key(
    tenant: TenantArgument,
    key: Annotated[str, typer.Argument(help="Its id, key_….")],
    as_json: JsonFlag = False,
) -> None:
    """Revoke a key: the next request with it is refused."""
    client = Client()
    print_done(client.admin.revoke_key(_tenant_id(client, tenant), key), as_json, f"{key} is revoked.")


def _print_with_key(answer: Object, as_json: bool) -> None:
    if as_json:
        print_json(answer)
        return
    print_fields({field: answer[field] for field in ("id", "name", "share", "key") if field in answer})
    note("The key is shown this once; the server keeps only its hash.")


def _tenant_id(client: Client, reference: str) -> str:
    """The id of the tenant with that id or name."""
    ids: list[str] = [one["id"] for one in client.admin.tenants() if one["name"] == reference]
    return ids[0] if ids else reference


def _patiently(ask: Callable[[], Object]) -> Object:
    """The answer, however long the server, or its database, is away."""
    is_told = False
    while True:
        try:
            return ask()
        except MixloomError as error:
            if error.status not in AWAY and not isinstance(error, ServerUnreachable):
                raise
            if not is_told:
                note(f"Waiting for the server: {error}")
                is_told = True
            time.sleep(POLL_SECONDS)


def _seconds(duration: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", duration)
    if match is None:
        raise usage_error(f"--deadline takes a duration such as 90s, 30m or 2h, got '{duration}'.")
    return float(match[1]) * SECONDS[match[2]]


def _in_words(drain: Object) -> str | None:
    if not drain["draining"]:
        return None
    why = f" ({drain['reason']})" if drain["reason"] else ""
    return f"{drain['mode']}{why}, by {drain['created_by']}, since {moment(drain['created_at'])}"
