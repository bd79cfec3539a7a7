"""Commands about jobs that are there: list, show, follow, steer, download."""

import json
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from mixloom.cli.bars import follow, outcome
from mixloom.cli.names import JobArgument, JobsArgument, job_of
from mixloom.cli.output import (
    INTERRUPTED,
    JsonFlag,
    moment,
    note,
    print_fields,
    print_json,
    print_json_line,
    print_table,
    say,
    usage_error,
)
from mixloom.client import Client
from mixloom.jobs import ENDED, POLL_SECONDS
from mixloom.transport import Object


def jobs(
    status: Annotated[str | None, typer.Option(help="Only jobs of this status.")] = None,
    name: Annotated[str | None, typer.Option(help="Only jobs of this name.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most jobs to list, the newest first.")] = 20,
    as_json: JsonFlag = False,
) -> None:
    """List your jobs."""
    found = Client().jobs.list(limit, status=status, name=name)
    if as_json:
        print_json(found)
        return
    columns = ["id", "name", "status", "method", "step", "loss", "created"]
    print_table(columns, (_line(job) for job in found))


def show(job: JobArgument, as_json: JsonFlag = False) -> None:
    """Show one job in full."""
    client = Client()
    found = job_of(client, job)
    if as_json:
        print_json(found)
        return
    progress = found["progress"]
    print_fields(
        {
            **{field: found[field] for field in ("id", "name", "status", "requested")},
            "waits": (found["queue"] or {}).get("sentence"),
            "error": (found["error"] or {}).get("message"),
            "steps": f"{progress['step']} of {progress['total_steps']}",
            "tokens": f"{progress['tokens']} of {progress['total_tokens']}",
            "data": [_part_line(part) for part in found["mixture"] or ()] or found["dataset"],
            "latest": _by_name(found),
            "base": found["base"],
            "started from": (found["init_from"] or {}).get("adapter"),
            "adapter": found["adapter"],
            "training": found["training"],
            "adapter id": found["adapter_id"],
            "sha256": found["adapter_sha256"],
            **{field: moment(found[f"{field}_at"]) for field in ("created", "started", "finished")},
            "finish expected": moment(found["estimated_finish"]),
        }
    )


def watch(
    job: Annotated[
        list[str] | None, typer.Argument(metavar="[JOB...]", help="Default: every job that has not ended.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show jobs while they train. Exit code 0 when all of them succeeded."""
    client = Client()
    if job:
        ids = [job_of(client, reference)["id"] for reference in job]
    else:
        ids = [found["id"] for found in client.jobs.iterate(order="asc") if found["status"] not in ENDED]
    if not ids:
        note("No job is waiting or training.")
        return
    raise typer.Exit(follow(client, ids, as_json=as_json))


def wait(job: JobsArgument, as_json: JsonFlag = False) -> None:
    """Wait, silently, until jobs have ended. Exit code 0 when all of them succeeded."""
    client = Client()
    ids = [job_of(client, reference)["id"] for reference in job]
    ended = list(client.jobs.watch(ids))[-1]
    if as_json:
        print_json(ended)
    raise typer.Exit(outcome(ended))


def experts(
    job: JobArgument,
    layers: Annotated[bool, typer.Option("--layers", help="Of the newest step, every layer and expert.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show the parts of a MixLoRA job's tokens that its experts get, in the last step and each tenth before it."""
    client = Client()
    id_ = job_of(client, job)["id"]
    found = list(client.jobs.experts(id_, limit=1, order="desc") if layers else client.jobs.experts(id_))
    if as_json:
        print_json(found)
        return
    if not found:
        note("No step with loads has been taken yet; the first is step 10, or the last one.")
    elif layers:
        (newest,) = found
        columns = [f"expert {number}" for number in range(len(newest["layers"][0]["loads"]))]
        print_table(["layer", "std", *columns], (_layer_line(layer) for layer in newest["layers"]))
    else:
        print_table(["step", "slots", "mean", "std", "least", "most"], (_loads_line(step) for step in found))


def logs(
    job: JobArgument,
    follow_on: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Print what happened to a job, one event a line."""
    client = Client()
    id_ = job_of(client, job)["id"]
    after = None
    try:
        while True:
            ended = client.jobs.get(id_)["status"] in ENDED  # asked first: no event can come after it
            for event in client.jobs.events(id_, after=after):
                after = event["id"]
                _print_event(event, as_json)
            if ended or not follow_on:
                return
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def cancel(job: JobsArgument, as_json: JsonFlag = False) -> None:
    """Cancel jobs, for good."""
    client = Client()
    _steer(client, job, client.jobs.cancel, as_json)


def pause(job: JobsArgument, as_json: JsonFlag = False) -> None:
    """Pause jobs; they lose nothing."""
    client = Client()
    _steer(client, job, client.jobs.pause, as_json)


def resume(job: JobsArgument, as_json: JsonFlag = False) -> None:
    """Let paused jobs go on."""
    client = Client()
    _steer(client, job, client.jobs.resume, as_json)


def download(
    job: JobArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The zip file to write, or a folder for it.")
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="native (default; for LoRA that is PEFT's layout), peft or mixlora.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="A step, or best, in place of the last one.", metavar="STEP")
    ] = None,
    unpack: Annotated[bool, typer.Option("--unpack", help="Leave a folder in place of the zip file.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Save a job's adapter as a zip file."""
    client = Client()
    path = client.jobs.download_adapter(job_of(client, job)["id"], output, format=format, checkpoint=checkpoint)
    if unpack:
        path = _unpacked(path)
    if as_json:
        print_json({"path": str(path)})
    else:
        say(str(path))


def _unpacked(archive: Path) -> Path:
    folder = archive.with_suffix("")
    if folder == archive:
        raise usage_error(f"To be unpacked, the file's name must end in .zip, got '{archive}'.")
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    archive.unlink()
    return folder


def _steer(client: Client, references: list[str], act: Callable[[str], Object], as_json: bool) -> None:
    answers = [act(job_of(client, reference)["id"]) for reference in references]
    if as_json:
        print_json(answers)
        return
    for job in answers:
        requested = f", {job['requested']} requested" if job["requested"] else ""
        say(f"{job['id']}  {job['name']}: {job['status']}{requested}")


def _line(job: Object) -> list[object]:
    progress, loss = job["progress"], (job["metrics"] or {}).get("train_loss")
    return [
        job["id"],
        job["name"],
        job["status"],
        job["adapter"]["method"],
        f"{progress['step']}/{progress['total_steps']}",
        None if loss is None else f"{loss:.3f}",
        moment(job["created_at"]),
    ]


def _part_line(part: Object) -> str:
    return f"{part['name']} (weight {part['weight']:g}, {part['rows']} rows, {part['epoch_rows']} an epoch)"


def _by_name(job: Object) -> Object:
    """The metrics of a job's latest step; losses of its data sets under their names, where those differ."""
    names = {part["id"]: part["name"] for part in job["mixture"] or ()}
    if len(set(names.values())) < len(names):
        names = {}
    shown = {}
    for column, value in (job["metrics"] or {}).items():
        loss, dot, id_ = column.partition(".")
        shown[f"{loss}{dot}{names.get(id_, id_)}"] = value
    return shown


def _loads_line(step: Object) -> list[object]:
    loads = [load for layer in step["layers"] for load in layer["loads"]]
    figures = (step["mean"], step["std"], min(loads), max(loads))
    return [step["step"], step["slots"], *(f"{figure:.4f}" for figure in figures)]


def _layer_line(layer: Object) -> list[object]:
    return [layer["layer"], *(f"{figure:.4f}" for figure in (layer["std"], *layer["loads"]))]


def _print_event(event: Object, as_json: bool) -> None:
    if as_json:
        print_json_line(event)
    else:
        more = f"  {json.dumps(event['data'])}" if event.get("data") else ""
        say(f"{moment(event['created_at'])}  {event['kind']}  {event['message']}{more}")
