"""Adapters of jobs: the files first, then the row that names them, and with it the end of a job that ends so."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from sqlalchemy.orm import Session

from engine import formats
from engine.adapter import Adapter
from engine.base_model import BaseModel, Fingerprint
from server.daemon.books import Books
from server.daemon.model_card import model_card
from server.daemon.points import check_there, tell_of_failure
from server.daemon.writer import Writer
from server.db import events, runs
from server.db.daemons import Fenced
from server.db.tables import Job
from server.ids import new_id
from server.render import Renderer
from server.states import JobStatus
from server.store import LocalStore, Manifest


@dataclass(frozen=True, kw_only=True)
class State:
    """A job's weights at some step."""

    job: Job
    adapter: Adapter
    step: int
    valid_loss: float | None
    example: np.ndarray  # a row that it trained on
    id: str = field(default_factory=lambda: new_id("adp"))


@dataclass(frozen=True)
class Ending:
    """How the job ends whose last adapter this is."""

    status: JobStatus
    message: str
    error: dict[str, Any] | None = None


class Publisher:
    """Makes adapters of runs, by the writer, from copies."""

    def __init__(self, base: BaseModel, books: Books, store: LocalStore, writer: Writer):
        self.base = base
        self.books = books
        self.store = store
        self.writer = writer
        self.fingerprint = Fingerprint.of(base)

    @cached_property
    def _renderer(self) -> Renderer:
        """Read once: that takes as long as some passes.

        Raises `Fenced`: it cannot be read. The life that follows writes it anew.
        """
        try:
            return Renderer(self.store.path(f"bases/{self.base.hash}"))
        except Exception as error:  # `tokenizers` raises nothing narrower
            raise Fenced(f"the base's tokenizer cannot be read ({error})") from error

    def publish(self, state: State, ending: Ending | None, then: Callable[[], None]) -> None:
        """Keep a state as an adapter, and end its job if it is the last one; `then` runs when that is written."""
        job, key, copy = state.job, f"adapters/{state.id}", state.adapter.copy()
        config = formats.disk_config(
            state.adapter.config, base_name=job.base_name, activation=self.base.activation_name
        )
        card = model_card(
            self._renderer,
            job,
            state.example,
            step=state.step,
            valid_loss=state.valid_loss,
            fingerprint=self.fingerprint,
        )

        def add(files: Manifest) -> None:
            check_there(self.store)
            row = _row(state, key, files, final=_is_success(ending))
            for unwanted in self._add(job, row, ending):
                self.writer.delete(unwanted)
            then()

        self.writer.put(
            key,
            lambda folder: formats.write(formats.tensors(copy), config, folder, card),
            add,
            lambda error: tell_of_failure(self.books, job, f"The adapter of step {state.step}", error),
        )

    def _add(self, job: Job, row: dict[str, Any], ending: Ending | None) -> list[str]:
        """Insert the adapter and end the job; the keys to delete from the store."""
        data = {"step": row["step"], "adapter_id": row["id"], "sha256": row["sha256"]}
        with self.books.write() as session:
            if not self._end_or_hold(session, job, row, ending):
                return [row["key"]]
            unwanted = runs.add_adapter(session, row, keep=job.training["keep_checkpoints"])
            if row["key"] not in unwanted and not row["final"]:
                events.record(session, job, "checkpoint", f"Checkpoint of step {row['step']}.", data)
            if ending is not None:
                code = {"code": ending.error["code"]} if ending.error else {}
                events.record(session, job, ending.status, ending.message, {**data, **code})
        return unwanted

    def _end_or_hold(self, session: Session, job: Job, row: dict[str, Any], ending: Ending | None) -> bool:
        """End the job, or lock it where it goes on; False if it is not there, or not ours, any more."""
        if ending is None:
            return runs.lock_job(session, job.id) is not None
        ended = {"adapter_id": row["id"], "finished_at": row["created_at"], "requested": None, "error": ending.error}
        return runs.move(session, job.id, ending.status, held_by=self.books.epoch, **ended)


def _is_success(ending: Ending | None) -> bool:
    return ending is not None and ending.status is JobStatus.SUCCEEDED


def _row(state: State, key: str, files: Manifest, *, final: bool) -> dict[str, Any]:
    job = state.job
    return {
        "id": state.id,
        "tenant_id": job.tenant_id,
        "name": job.name if final else f"{job.name}, step {state.step}",
        "job_id": job.id,
        "step": state.step,
        "final": final,
        "base_name": job.base_name,
        "base_hash": job.base_hash,
        "method": job.adapter["method"],
        "config": job.adapter,
        "valid_loss": state.valid_loss,
        "exact": job.exact,
        "key": key,
        **files[formats.WEIGHTS],
        "created_at": time.time(),
        "manifest": files,
    }
