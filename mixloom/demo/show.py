"""`mixloom demo`: two tenants, four jobs at once on a real server, and what they have learned."""

import shutil
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mixloom.cli.bars import display, outcome
from mixloom.cli.output import INTERRUPTED, note, print_table, say, stdout
from mixloom.client import Client
from mixloom.demo.measure import Exam, accuracies, answer
from mixloom.demo.server import DemoFailed, DemoServer, serving
from mixloom.demo.tasks import TASKS, Row, majority_accuracy
from mixloom.errors import MixloomError
from mixloom.jobs import ENDED
from mixloom.transport import Object

HELD_OUT_ROWS = 100
BAR_POINTS = 30.0
"""An adapter has learned its task when it beats the base and the majority answer by so much."""

TRAINING = {"epochs": 1, "batch_size": 8, "learning_rate": 1.5e-3}
POLL_SECONDS = 0.5


@dataclass(kw_only=True)
class DemoJob:
    """One of the demo's jobs: what it is, and later what became of it."""

    name: str
    tenant: str
    task: str
    rows: int
    adapter: Object
    client: Client = field(init=False)
    job: Object = field(init=False)
    base_accuracy: float = field(init=False)
    majority_accuracy: float = field(init=False)
    accuracy: float = field(init=False)

    @property
    def train_rows(self) -> list[Row]:
        return TASKS[self.task].train_rows(self.rows)

    @property
    def held_out_rows(self) -> list[Row]:
        return TASKS[self.task].heldout_rows(HELD_OUT_ROWS)

    @property
    def gain_points(self) -> float:
        return 100 * (self.accuracy - max(self.base_accuracy, self.majority_accuracy))


def _mixlora(rank: int, num_experts: int, top_k: int) -> Object:
    return {"method": "mixlora", "rank": rank, "num_experts": num_experts, "top_k": top_k}


def jobs_of_the_demo() -> list[DemoJob]:
    return [
        DemoJob(name="dates-lora", tenant="north", task="dates", rows=176, adapter={"method": "lora", "rank": 16}),
        DemoJob(name="dates-mixlora", tenant="north", task="dates", rows=176, adapter=_mixlora(8, 6, 3)),
        DemoJob(name="orders-mixlora", tenant="south", task="orders", rows=120, adapter=_mixlora(16, 8, 2)),
        DemoJob(name="queues-mixlora", tenant="south", task="queues", rows=160, adapter=_mixlora(4, 8, 4)),
    ]


def run(folder: Path, *, keep_running: bool) -> int:
    """The whole demo in `folder`; its exit code: 0 only if every adapter has learned its task."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with serving(folder.resolve()) as server:
            with stdout.status("Starting the server") as status:
                server.wait_until_ready(status.update)
            demo_jobs = jobs_of_the_demo()
            keys = submit(server, demo_jobs, TRAINING)
            train(demo_jobs)
            _measure(demo_jobs)
            _download(demo_jobs, folder)
            _print_results(demo_jobs)
            _print_next(server, folder, keys, keep_running)
            if keep_running:
                with suppress(KeyboardInterrupt):
                    server.process.wait()
        return _verdict(demo_jobs)
    except DemoFailed as error:
        note(f"error: {error}")
    except MixloomError as error:
        note(f"error: {error}\nThe server's log is {folder / 'server.log'}.")
    except KeyboardInterrupt:
        note("Stopped; the server is down.")
        return INTERRUPTED
    return 1


def submit(server: DemoServer, demo_jobs: list[DemoJob], training: Object) -> dict[str, str]:
    """Make the tenants, upload the rows, submit the jobs; the tenants' keys."""
    base = Client(server.url, server.admin_key).base()
    say(f"The server is at {server.url}, its base model is {base['name']} in {base['dtype']}.")
    keys: dict[str, str] = {}
    datasets: dict[str, str] = {}
    for demo_job in demo_jobs:
        if demo_job.tenant not in keys:
            keys[demo_job.tenant] = Client(server.url, server.admin_key).admin.create_tenant(demo_job.tenant)["key"]
        demo_job.client = Client(server.url, keys[demo_job.tenant])
        if demo_job.task not in datasets:
            rows = demo_job.train_rows
            _check_split(demo_job.held_out_rows, rows)
            datasets[demo_job.task] = demo_job.client.datasets.upload(rows, name=demo_job.task)["id"]
            say(f"Data set {demo_job.task}: {len(rows)} rows. {TASKS[demo_job.task].sentence}")
    for demo_job in demo_jobs:
        demo_job.job = demo_job.client.jobs.submit(
            name=demo_job.name, dataset=datasets[demo_job.task], adapter=demo_job.adapter, training=training
        )
    return keys


def _check_split(held_out: list[Row], train: list[Row]) -> None:
    seen = {row["prompt"] for row in train}
    assert not any(row["prompt"] in seen for row in held_out), "a held-out prompt occurs in training"


def train(demo_jobs: list[DemoJob]) -> None:
    """Show all jobs until the last has ended. Raises `DemoFailed` when one did not succeed."""
    say(f"\n{len(demo_jobs)} jobs of two tenants train at once:")
    started = time.monotonic()
    with display() as shown:
        while True:
            for demo_job in demo_jobs:
                demo_job.job = demo_job.client.jobs.get(demo_job.job["id"])
            shown.show([demo_job.job for demo_job in demo_jobs])
            if all(demo_job.job["status"] in ENDED for demo_job in demo_jobs):
                break
            time.sleep(POLL_SECONDS)
    if outcome([demo_job.job for demo_job in demo_jobs]):
        raise DemoFailed("Not every job succeeded.")
    tokens, seconds = sum(one.job["progress"]["tokens"] for one in demo_jobs), time.monotonic() - started
    say(f"{tokens:,} tokens in {seconds:.0f} s: {tokens / seconds:.0f} tokens a second over all jobs.\n")


def _measure(demo_jobs: list[DemoJob]) -> None:
    """Ask the base (once a task) and each adapter all held-out rows."""
    of_tasks = {demo_job.task: demo_job for demo_job in demo_jobs}
    asked = [(demo_job, "base") for demo_job in of_tasks.values()]
    asked += [(demo_job, demo_job.job["id"]) for demo_job in demo_jobs]
    exams = [Exam(one.client, model, one.held_out_rows, TASKS[one.task].max_tokens) for one, model in asked]
    with stdout.status("The base and the adapters answer") as status:
        shares = accuracies(
            exams, lambda done: status.update(f"The base and the adapters have answered {done} held-out rows")
        )
    of_base = dict(zip(of_tasks, shares, strict=False))
    for demo_job, share in zip(demo_jobs, shares[len(of_tasks) :], strict=True):
        demo_job.base_accuracy = of_base[demo_job.task]
        demo_job.majority_accuracy = majority_accuracy(demo_job.train_rows, demo_job.held_out_rows)
        demo_job.accuracy = share


def _download(demo_jobs: list[DemoJob], folder: Path) -> None:
    for demo_job in demo_jobs:
        archive = folder / "adapters" / f"{demo_job.name}.zip"
        demo_job.client.jobs.download_adapter(demo_job.job["id"], archive)


def _print_results(demo_jobs: list[DemoJob]) -> None:
    say(f"Right answers to {HELD_OUT_ROWS} held-out rows each, word for word:")
    print_table(
        ["job", "tenant", "config", "steps", "base", "majority answer", "adapter", "gain"],
        (
            [
                demo_job.name,
                demo_job.tenant,
                ", ".join(f"{key} {value}" for key, value in demo_job.adapter.items() if key != "method"),
                demo_job.job["progress"]["step"],
                f"{demo_job.base_accuracy:.0%}",
                f"{demo_job.majority_accuracy:.0%}",
                f"{demo_job.accuracy:.0%}",
                f"{demo_job.gain_points:+.0f} points",
            ]
            for demo_job in demo_jobs
        ),
    )
    say("\nThe same prompt for both:")
    for demo_job in demo_jobs:
        prompt, max_tokens = demo_job.held_out_rows[0]["prompt"], TASKS[demo_job.task].max_tokens
        of_base = answer(demo_job.client, "base", prompt, max_tokens)
        of_adapter = answer(demo_job.client, demo_job.job["id"], prompt, max_tokens)
        say(f"  {prompt}\n    base            {of_base!r}\n    {demo_job.name:<14}  {of_adapter!r}")


def _print_next(server: DemoServer, folder: Path, keys: dict[str, str], keep_running: bool) -> None:
    command = "mixloom" if shutil.which("mixloom") else str(Path(sys.executable).with_name("mixloom"))
    tenant, key = next(iter(keys.items()))
    port = server.url.rpartition(":")[2]
    serve = f"  {command} serve --data-dir {folder / 'data'} --port {port}   # the demo's has ended"
    lines = [
        "",
        f"Adapters: {folder / 'adapters'}    Database and store: {folder / 'data'}    Log: {folder / 'server.log'}",
        "",
        f"What to try next{', in another terminal (Ctrl-C here stops the server)' if keep_running else ''}:",
        *([] if keep_running else [serve]),
        f"  export MIXLOOM_URL={server.url} MIXLOOM_API_KEY={key}   # tenant {tenant}",
        f"  {command} jobs",
        f'  {command} generate dates-lora "Date: May the ninth, 1999"',
        f"  {command} submit your.csv --column prompt=question --column completion=answer --watch",
    ]
    for line in lines:
        say(line)


def _verdict(demo_jobs: list[DemoJob]) -> int:
    missed = [demo_job.name for demo_job in demo_jobs if demo_job.gain_points < BAR_POINTS]
    if missed:
        note(f"error: fewer than {BAR_POINTS:.0f} points gained by {', '.join(missed)}.")
    return 1 if missed else 0
