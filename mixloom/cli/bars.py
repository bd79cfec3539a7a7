"""Jobs while they train: live bars on a terminal, plain lines elsewhere, JSON lines for programs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from mixloom.cli.output import INTERRUPTED, JOB_NOT_SUCCEEDED, note, print_json_line, say, stdout
from mixloom.client import Client
from mixloom.transport import Object, Objects

SECONDS_BETWEEN_LINES = 10.0


class Display(Protocol):
    """Shows jobs as they are now; called again and again."""

    def show(self, jobs: Objects) -> None: ...


class Bars:
    """A Rich bar a job."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._valid_loss: dict[str, float] = {}

    def show(self, jobs: Objects) -> None:
        for job in jobs:
            id_ = job["id"]
            if id_ not in self._tasks:
                self._tasks[id_] = self._progress.add_task(job["name"], state="", figures="")
            valid_loss = (job["metrics"] or {}).get("valid_loss")
            if valid_loss is not None:
                self._valid_loss[id_] = valid_loss
            self._progress.update(
                self._tasks[id_],
                completed=job["progress"]["step"],
                total=job["progress"]["total_steps"],
                state=state(job),
                figures=figures(job, self._valid_loss.get(id_)),
            )


class Lines:
    """A line a job when its status changes, and every ten seconds when it moved."""

    def __init__(self) -> None:
        self._said: dict[str, tuple[str, int, float]] = {}

    def show(self, jobs: Objects) -> None:
        for job in jobs:
            step, now = job["progress"]["step"], time.monotonic()
            status, last_step, when = self._said.get(job["id"], ("", -1, 0.0))
            moved = step != last_step and now - when >= SECONDS_BETWEEN_LINES
            if state(job) != status or moved:
                self._said[job["id"]] = (state(job), step, now)
                parts = [
                    job["name"],
                    f"{step}/{job['progress']['total_steps']}",
                    figures(job, None),
                    state(job),
                ]
                say("  ".join(filter(None, parts)))


class JsonLines:
    """The job as JSON, each time that it changed."""

    def __init__(self) -> None:
        self._said: dict[str, Object] = {}

    def show(self, jobs: Objects) -> None:
        for job in jobs:
            if self._said.get(job["id"]) != job:
                self._said[job["id"]] = job
                print_json_line(job)


@contextmanager
def display(as_json: bool = False) -> Iterator[Display]:
    """The display that fits where stdout goes."""
    if as_json:
        yield JsonLines()
    elif not stdout.is_terminal:
        yield Lines()
    else:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TextColumn("{task.fields[state]}", markup=False),
        )
        with Progress(*columns, console=stdout) as progress:
            yield Bars(progress)


def follow(client: Client, ids: list[str], *, as_json: bool) -> int:
    """Show the jobs until all have ended; the exit code that says how."""
    jobs: Objects = []
    try:
        with display(as_json) as shown:
            for jobs in client.jobs.watch(ids):
                shown.show(jobs)
    except KeyboardInterrupt:
        note("No longer watching; the jobs go on. `mixloom watch` shows them again.")
        raise typer.Exit(INTERRUPTED) from None
    return outcome(jobs)


def outcome(jobs: Objects) -> int:
    """0 when every job succeeded; else 1, and a sentence for each that did not."""
    for job in jobs:
        if job["status"] != "succeeded":
            why = f": {job['error']['message']}" if job["error"] else "."
            note(f"{job['name']} ({job['id']}) {job['status']}{why}")
    return 0 if all(job["status"] == "succeeded" for job in jobs) else JOB_NOT_SUCCEEDED


def state(job: Object) -> str:
    """Its status, what was asked of it, and why it waits."""
    requested = f" ({job['requested']} requested)" if job["requested"] else ""
    sentence = (job["queue"] or {}).get("sentence")
    return f"{job['status']}{requested}" + (f": {sentence}" if sentence else "")


def figures(job: Object, valid_loss: float | None) -> str:
    """Losses and speed of its latest step."""
    metrics = job["metrics"] or {}
    valid = valid_loss if valid_loss is not None else metrics.get("valid_loss")
    parts = []
    if metrics:
        parts.append(f"loss {metrics['train_loss']:.3f}")
    if valid is not None:
        parts.append(f"valid {valid:.3f}")
    if metrics and job["status"] == "running":
        parts.append(f"{metrics['tokens_per_second']:.0f} tokens/s")
    return "  ".join(parts)
