"""What one turn of the daemon costs beside the engine: snapshot, plan and record, through the real database.

The real loop trains real runs, of a few thousand parameters unless there is `--base`; many tenants' jobs wait behind.
"""

import argparse
import random
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sqlalchemy import insert, text

from benchmarks import machine
from benchmarks.reports import write_json
from benchmarks.tiny import write_tiny_base
from engine import base_model, sources
from engine.engine import Engine
from engine.memory import measure
from scheduler.plan import Plan
from server.daemon.books import Books
from server.daemon.loop import Loop
from server.daemon.passes import Riding
from server.daemon.publish import base_row
from server.daemon.pulse import Pulse
from server.daemon.recorder import Ended
from server.daemon.room import Room
from server.daemon.roster import Roster
from server.daemon.sampler import Sampler
from server.daemon.upkeep import Clock
from server.daemon.writer import Writer
from server.db.migrate import upgrade
from server.db.session import Database
from server.db.stores import refuse_other_store
from server.db.tables import Counter, Job, Run, Tenant
from server.settings import Settings
from server.store import LocalStore
from server.tokens import TokenRow, TokenRows

ROWS = "jobs/shared"
UNLIMITED = 2**50
"""Bytes: that they are counted belongs to a turn, that they are few does not."""
PARTS = DECIDE, RECORD, BOTH, OUTSIDE, TURN = (
    "snapshot and plan",
    "record",
    "both",
    "all outside the engine",
    "the whole turn",
)
SMALL_JOBS = {"rank": 4, "alpha": 8, "method": "lora", "target_modules": ["q_proj", "v_proj"], "batch_size": 4}
DEMOS_JOBS = {
    **{"rank": 16, "alpha": 32, "method": "mixlora", "num_experts": 8, "top_k": 2, "router_aux_loss_coef": 1e-3},
    **{
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "batch_size": 8,
    },
}


@dataclass(frozen=True)
class Seconds:
    """By the wall's clock, and of a processor for the loop's thread: what SQLite does is in that, a server is not."""

    wall: float
    processor: float

    @classmethod
    def now(cls) -> "Seconds":
        return cls(time.perf_counter(), time.thread_time())

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.wall + other.wall, self.processor + other.processor)

    def __sub__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.wall - other.wall, self.processor - other.processor)


class Timed(Loop):
    """The daemon's loop with a watch on what is not the engine's: all but the passes and the optimizers' steps."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.seconds: dict[str, list[Seconds]] = {part: [] for part in PARTS}
        self._engine_began = self._engine_seconds = Seconds(0.0, 0.0)

    def turn(self) -> bool:
        with self._watch(TURN):
            trained = super().turn()
        self.seconds[OUTSIDE].append(self.seconds[TURN][-1] - self._engine_seconds)
        return trained

    def decide(self) -> Plan:
        with self._watch(DECIDE):
            decision = super().decide()
        self._engine_began = Seconds.now()
        return decision

    def record(self, decision: Plan, gang: Sequence[Riding], ended: Ended) -> None:
        self._engine_seconds = Seconds.now() - self._engine_began
        with self._watch(RECORD):
            super().record(decision, gang, ended)
        self.seconds[BOTH].append(self.seconds[DECIDE][-1] + self.seconds[RECORD][-1])

    @contextmanager
    def _watch(self, part: str) -> Iterator[None]:
        began = Seconds.now()
        yield
        self.seconds[part].append(Seconds.now() - began)


def main(arguments: list[str]) -> int:
    """Fill the queue, let gangs go, print the table and write the JSON; the exit code."""
    options = _parser().parse_args(arguments)
    console = Console()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            data_dir=Path(folder) / "data",
            database_url=options.database_url,
            max_resident_runs=options.places,
            recovery_seconds=1e9,
        )
        loop = _loop(settings, Path(folder), options)
        for _ in range(options.warm_up + options.gangs):
            loop.turn()
        report = _report(loop, options)
        loop.writer.wait()
    console.print(_table(report), highlight=False)
    write_json(report, options.json)
    return 0


def _loop(settings: Settings, folder: Path, options: argparse.Namespace) -> Timed:
    upgrade(settings)
    database, store = Database(settings.database), LocalStore(settings.data_dir)
    refuse_other_store(settings, database)
    place = sources.resolve(options.base) if options.base else write_tiny_base(folder / "base")
    base = base_model.load(place, name=place.name, dtype=torch.float32, device="cpu")
    store.put(ROWS, lambda place: _rows().save(place / "train.safetensors"))
    counters = [0.0 if options.fresh else random.Random(n).uniform(0, 1e6) for n in range(options.tenants)]
    jobs = DEMOS_JOBS if options.base else SMALL_JOBS
    _fill(database, base.hash, jobs, counters=counters, num_jobs=options.jobs)
    _gather_statistics(database)
    books = Books.begin(database, lease_seconds=3600)
    engine, writer = Engine(base), Writer(store)
    roster = Roster(engine, books, store, writer, settings)
    sampler, pulse = Sampler(engine, books, store, settings), Pulse(settings.hang_seconds)
    row = base_row(base, source=place, tokenizer={}, probed={}, memory=measure(base))
    return Timed(
        engine,
        books,
        settings,
        roster,
        sampler,
        writer,
        clock=Clock(),
        pulse=pulse,
        stopping=threading.Event(),
        room=Room(row, UNLIMITED),
    )


def _rows() -> TokenRows:
    """Eight rows of 48 tokens, as long as the demo's, which all jobs train on."""
    tokens = [[1 + (row * 7 + place) % 60 for place in range(48)] for row in range(8)]
    return TokenRows.of([TokenRow(row, [True] * len(row)) for row in tokens])


def _fill(
    database: Database, base_hash: str, like: Mapping[str, Any], *, counters: Sequence[float], num_jobs: int
) -> None:
    """Tenants of shares 1 to 4 with as many queued jobs each, in turns, none of which ends."""
    adapter = {"dropout": 0.05, "rslora": False, "dora": False, "num_experts": None, "top_k": None, **like}
    batch_size = adapter.pop("batch_size")
    training = {
        **{
            "batch_size": batch_size,
            "learning_rate": 1e-4,
            "schedule": "constant",
            "warmup_steps": 0,
            "weight_decay": 0.0,
        },
        **{"max_grad_norm": 1.0, "microbatch_tokens": 256, "seed": 1, "evaluate_every": None, "loraplus_ratio": 1.0},
        **{"checkpoint_every": 10**9, "keep_checkpoints": 1, "total_steps": 10**6, "cutoff_length": 256},
    }
    job = {
        **{"name": "job", "request": {}, "status": "queued", "base_name": "tiny", "base_hash": base_hash},
        **{"dataset_id": "ds", "dataset_sha256": "", "validation": {}, "tokens_key": ROWS, "priority": "normal"},
        **{"adapter": adapter, "training": training, "labels": {}},
        **{"total_steps": 10**6, "total_tokens": 10**8, "step": 0, "tokens": 0, "exact": True, "created_by": "key"},
    }
    ids = [f"ten_{n:028}" for n in range(len(counters))]
    with database.write() as session:
        tenants = [{"id": id_, "name": f"t{n}", "share": 1.0 + n % 4, "created_at": 0.0} for n, id_ in enumerate(ids)]
        session.execute(insert(Tenant), tenants)
        accounts = [{"tenant_id": id_, "seat": 1, "counter": at} for id_, at in zip(ids, counters, strict=True)]
        session.execute(insert(Counter), accounts)
    for start in range(0, num_jobs, 10_000):
        numbers = range(start, min(start + 10_000, num_jobs))
        owners = {n: ids[n % len(ids)] for n in numbers}
        with database.write() as session:
            session.execute(
                insert(Job),
                [
                    {
                        **job,
                        "id": f"job_{n:028}",
                        "number": n + 1,
                        "tenant_id": owners[n],
                        "weight": (1, 4, 16)[n % 3],
                        "created_at": float(n),
                    }
                    for n in numbers
                ],
            )
            session.execute(
                insert(Run),
                [{"id": f"run_{n:028}", "job_id": f"job_{n:028}", "tenant_id": owners[n], **_RUN} for n in numbers],
            )


def _gather_statistics(database: Database) -> None:
    """As PostgreSQL does by itself within a minute of so many new rows; SQLite has none."""
    if database.path is None:
        with database.write() as session:
            session.execute(text("ANALYZE"))


_RUN = {"counter": 0.0, "cost_charged": 0, "attempts": 0}


def _report(loop: Timed, options: argparse.Namespace) -> dict[str, Any]:
    measured = {part: seconds[options.warm_up :] for part, seconds in loop.seconds.items()}
    return {
        "benchmark": "plan",
        "machine": machine.describe("cpu"),
        "settings": {
            "tenants": options.tenants,
            "jobs": options.jobs,
            "gangs": options.gangs,
            "places": options.places,
            "fresh": options.fresh,
            "base": options.base or "tiny",
            "database": "postgresql" if options.database_url else "sqlite",
        },
        "resident_runs": len(loop.residents),
        "milliseconds": {
            part: {
                "median": 1e3 * median(one.wall for one in seconds),
                "p90": 1e3 * quantiles((one.wall for one in seconds), n=10)[-1],
                "max": 1e3 * max(one.wall for one in seconds),
                "processor": 1e3 * median(one.processor for one in seconds),
            }
            for part, seconds in measured.items()
        },
    }


def _table(report: dict[str, Any]) -> Table:
    of = report["settings"]
    table = Table(
        title=f"{of['tenants']} {'new ' if of['fresh'] else ''}tenants, {of['jobs']} jobs, "
        f"{report['resident_runs']} resident, {of['database']}",
        caption=f"{of['gangs']} gangs",
    )
    table.add_column("milliseconds a gang", no_wrap=True)
    for heading in ("median", "p90", "max", "processor, median"):
        table.add_column(heading, justify="right")
    for part, values in report["milliseconds"].items():
        table.add_row(part, *(f"{value:.2f}" for value in values.values()))
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks plan", description=__doc__)
    parser.add_argument("--tenants", type=int, default=1000, help="tenants with queued jobs (1000)")
    parser.add_argument("--jobs", type=int, default=100_000, help="queued jobs of all together (100000)")
    parser.add_argument("--gangs", type=int, default=300, help="gangs that are measured (300)")
    parser.add_argument("--warm-up", type=int, default=30, help="gangs before those (30)")
    parser.add_argument("--places", type=int, default=16, help="max_resident_runs (16)")
    parser.add_argument("--fresh", action="store_true", help="no tenant was ever served: all have the same counter")
    parser.add_argument("--base", help="a hub name, a folder or a GGUF file: trained as in the demo, in float32")
    parser.add_argument("--threads", type=int, default=1, help="of the engine (1)")
    parser.add_argument("--database-url", help="a PostgreSQL database to use and fill; else SQLite in a new folder")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    return parser
