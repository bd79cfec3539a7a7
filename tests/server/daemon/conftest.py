"""The real daemon on the real API's database, in this process: lives that are driven turn by turn."""

import functools
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.processes import Tables
from engine import base_model
from engine.base_model import BaseModel
from engine.engine import Engine
from engine.memory import measure
from server.api.services import Services
from server.daemon.books import Books
from server.daemon.loop import Loop
from server.daemon.publish import base_row, publish_tokenizer, read_tokenizer
from server.daemon.pulse import Pulse
from server.daemon.room import Room
from server.daemon.roster import Resident, Roster
from server.daemon.sampler import Sampler
from server.daemon.upkeep import Clock, clear_orphans
from server.daemon.writer import Writer
from server.db import bases, daemons, recovery_points
from server.db.tables import Adapter, Counter, Event, Job, Metric, RecoveryPoint, Run
from server.settings import Settings
from server.states import ENDED
from server.store import manifest
from server.tokens import TokenRows
from tests.base_folder import write_tiny_base
from tests.server.conftest import Caller
from tests.server.making import prompt_rows, upload

MICROBATCH_TOKENS = 256
MAX_TURNS = 2000


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def frozen(folder: Path) -> Iterator[BaseModel]:
    """The tiny base."""
    yield from load_frozen(folder, torch.float32)


def load_frozen(folder: Path, dtype: torch.dtype) -> Iterator[BaseModel]:
    """On one thread, as the fingerprint wants it, until the fixture that yields it ends."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield base_model.load(folder, name="tiny", dtype=dtype, device="cpu", microbatch_tokens=MICROBATCH_TOKENS)
    torch.set_num_threads(before)


memory_of = functools.cache(measure)
"""What passes of a base take: measured once."""


class Life:
    """One life of the daemon. Another one that begins fences it, as a restart does."""

    def __init__(
        self,
        services: Services,
        base: BaseModel,
        folder: Path,
        *,
        supervisor: str = "the same",
        name: str = "one",
        room: int | None = None,
        **changes: Any,
    ):
        """`room`: bytes beside the base for runs and passes; None: nobody counts them."""
        self.services = services
        self.settings = Settings(
            **{**services.settings.model_dump(), "recovery_steps": 5, "token_budget": 1024, **changes}
        )
        self.books = Books.begin(services.database, lease_seconds=3600, supervisor=supervisor, name=name)
        clear_orphans(self.books, services.store)
        engine, self.writer = Engine(base), Writer(services.store)
        self.roster = Roster(engine, self.books, services.store, self.writer, self.settings)
        sampler = Sampler(engine, self.books, services.store, self.settings)
        tokenizer = read_tokenizer(base, folder, self.settings)
        publish_tokenizer(services.store, base, tokenizer)
        published = base_row(base, source=folder, tokenizer=tokenizer, probed={}, memory=memory_of(base))
        self.loop = Loop(
            engine,
            self.books,
            self.settings,
            self.roster,
            sampler,
            self.writer,
            pulse=Pulse(self.settings.hang_seconds),
            stopping=threading.Event(),
            clock=Clock(),
            room=None if room is None else Room(published, room),
        )
        with self.books.write() as session:
            bases.publish(session, published)
            daemons.update_daemon(session, self.books.epoch, base_hash=base.hash, state="ready")

    def turn(self, count: int = 1) -> None:
        """So many rounds of the loop; what they wrote is settled, so that a test sees each turn whole."""
        for _ in range(count):
            self.loop.turn()
            self.writer.wait()

    def turn_until(self, condition: Callable[[], bool]) -> None:
        """As many turns as it takes."""
        for _ in range(MAX_TURNS):
            if condition():
                return
            self.turn()
        raise AssertionError(f"not within {MAX_TURNS} turns")

    def finish(self) -> None:
        """Go on until every job has ended."""
        self.turn_until(lambda: all(job.status in ENDED for job in jobs(self.services)))
        self.turn()  # what the last one left behind is cleaned up

    def resident(self, job_id: str) -> Resident:
        """The run of a job that is in memory."""
        return next(one for one in self.roster.residents.values() if one.job.id == job_id)

    def step_of(self, job_id: str) -> int:
        return self.resident(job_id).program.cursor.step


@pytest.fixture
def new_life(services: Services, frozen: BaseModel, folder: Path) -> Callable[..., Life]:
    """Begins a life: `new_life(recovery_steps=2)`."""

    def begin(**changes: Any) -> Life:
        return Life(services, frozen, folder, **changes)

    return begin


@pytest.fixture
def life(new_life: Callable[..., Life]) -> Life:
    return new_life()


class Gate:
    """Holds a life's writer up, as a slow disk would."""

    def __init__(self, writer: Writer):
        self.writer = writer
        self._event = threading.Event()

    def close(self, key: str = "held") -> None:
        """A folder is being written at `key` until the gate opens."""
        self.writer.put(key, self._write, lambda files: None)

    def open(self) -> None:
        self._event.set()

    def _write(self, folder: Path) -> None:
        assert self._event.wait(30)
        (folder / "file").write_text("text")


@pytest.fixture
def gate(life: Life) -> Iterator[Gate]:
    gate = Gate(life.writer)
    yield gate
    gate.open()


MIXTURE = {"method": "mixlora", "rank": 4, "num_experts": 4, "top_k": 2}
PLAIN = {"method": "lora", "rank": 8}


def submit(
    caller: Caller, adapter: dict[str, Any], *, steps: int = 12, rows: int = 12, batch: int = 4, **fields: Any
) -> str:
    """The id of a new job of so many optimizer steps."""
    training = {"max_steps": steps, "batch_size": batch, "learning_rate": 5e-3, **fields.pop("training", {})}
    dataset = fields.pop("dataset", None) or upload(caller, prompt_rows(rows))
    body = {"dataset": dataset, "adapter": adapter, "training": training, **fields}
    answer = caller.post("/jobs", json=body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


@pytest.fixture(scope="module")
def kept() -> dict[str, str]:
    return {}


@pytest.fixture
def undisturbed(kept: dict[str, str], life: Life, alice: Caller, services: Services) -> str:
    """The hash of `submit(alice, MIXTURE)` where nothing happens to it; once a module."""
    if "hash" not in kept:
        id_ = submit(alice, MIXTURE)
        life.finish()
        kept["hash"] = final_hash(services, id_)
        alice.delete(f"/jobs/{id_}")
    return kept["hash"]


class OnDisk:
    """A data directory and its database, as `benchmarks.oracle` reads them."""

    def __init__(self, data: Path, database_url: str | None = None):
        self.data = data
        self.rows = Tables(data, database_url).rows


def break_rows(services: Services, job_id: str, *rows: int) -> None:
    """Let rows of a job begin with a token that there is not, as if they had been submitted so."""
    with services.database.write() as session:
        one = session.get_one(Job, job_id)
        folder = services.store.path(one.tokens_key)
        tokens = TokenRows.load(folder / "train.safetensors")
        tokens.tokens[tokens.offsets[list(rows)]] = 10**6
        tokens.save(folder / "train.safetensors")
        one.tokens_manifest = manifest(folder)


def jobs(services: Services) -> list[Job]:
    """Every job, in order of submission."""
    with services.database.read() as session:
        return session.query(Job).order_by(Job.number).all()


def job(services: Services, job_id: str) -> Job:
    with services.database.read() as session:
        return session.get_one(Job, job_id)


def counter(services: Services, tenant: Caller, seat: int = 1) -> Counter:
    """What the daemon of a seat has added up for a tenant."""
    with services.database.read() as session:
        return session.get_one(Counter, (tenant.tenant_id, seat))


def final_hash(services: Services, job_id: str) -> str:
    """sha256 of the adapter of a job that has succeeded."""
    with services.database.read() as session:
        one = session.get_one(Job, job_id)
        assert one.status == "succeeded", (one.status, one.error)
        return session.get_one(Adapter, one.adapter_id).sha256


def adapters(services: Services, job_id: str) -> list[Adapter]:
    """A job's adapters, by step."""
    with services.database.read() as session:
        return session.query(Adapter).filter_by(job_id=job_id).order_by(Adapter.step).all()


def events(services: Services, job_id: str) -> list[str]:
    """The kinds of a job's events, in order."""
    with services.database.read() as session:
        return [event.kind for event in session.query(Event).filter_by(job_id=job_id).order_by(Event.id)]


def points(services: Services, job_id: str) -> list[RecoveryPoint]:
    """The job's recovery points, the newest first."""
    with services.database.read() as session:
        run = session.query(Run).filter_by(job_id=job_id).one()
        return list(recovery_points.of_run(session, run.id))


def steps(services: Services, job_id: str) -> list[int]:
    """The steps that have metrics, in order."""
    with services.database.read() as session:
        return [metric.step for metric in session.query(Metric).filter_by(job_id=job_id).order_by(Metric.step)]


def first_page(path: Path, name: str) -> slice:
    """Where a table or an index begins in SQLite's file, which has all that was written."""
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)
        (size,) = connection.execute("PRAGMA page_size").fetchone()
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", [name]).fetchone()
    return slice((page - 1) * size, page * size)


def spoil_table(path: Path, name: str) -> None:
    """Overwrite the head of a table's first page."""
    begin = first_page(path, name).start
    content = bytearray(path.read_bytes())
    content[begin : begin + 64] = b"garbage " * 8
    path.write_bytes(content)


def spoil_index(services: Services, name: str) -> None:
    """Flip one bit at the end of an index's first page, where its first entry is."""
    path = services.database.path
    assert path is not None
    last = first_page(path, name).stop - 1
    content = bytearray(path.read_bytes())
    content[last] ^= 1
    path.write_bytes(content)
