"""`/generate`: requests are admitted between gangs and advance together, within their share of the time."""

import json
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from engine.adapter import Adapter
from engine.engine import Engine
from engine.errors import EngineError
from engine.sampling import DIVERGED, Sample, advance, scoring
from scheduler.cost import Prices
from server.daemon.books import Books
from server.daemon.prices import prices_of
from server.db import accounts, operations, runs
from server.db.tables import Operation
from server.disk import is_full
from server.faults import fault
from server.settings import Settings
from server.store import LocalStore

log = logging.getLogger("mixloom.daemon")
SLICE_TOKENS = 8
"""Few enough for a request that has just come not to wait long for the others' slice to end."""
KEPT_ADAPTERS = 16
MAX_CREDIT_SECONDS = 30.0
_UNREADABLE = {
    "category": "server",
    "code": "adapter_unreadable",
    "message": "The adapter's files on the server cannot be read. Take another checkpoint, or train it again.",
}
_FAILED = {
    "category": "server",
    "code": "generation_failed",
    "message": "The engine could not compute this answer. Ask for fewer tokens, or with another prompt.",
}
_NO_ROOM = {
    "category": "server",
    "code": "disk_full",
    "message": "The server's disk has no room for the answer.",
}
_UNWRITTEN = {
    "category": "server",
    "code": "answer_not_written",
    "message": "The server's disk did not take the answer. Ask again later, or tell the operator.",
}
_DIVERGED = {
    "category": "user",
    "code": "adapter_diverged",
    "message": "The adapter gives numbers that are infinite or none at all. Take an earlier checkpoint, or train it "
    "again with a lower learning rate.",
}


@dataclass
class Request:
    """An operation that is being sampled."""

    operation: Operation
    result: Path
    sample: Sample
    prices: Prices
    score: list[float | None] | None  # of the prompt's tokens, where it is asked for
    is_suspect: bool = False  # a pass that it was in failed: it goes on alone
    written: int = 0  # tokens already in the result file


class Sampler:
    """Keeps the requests under way, the adapters that were asked for last, and what tenants owe for it."""

    def __init__(self, engine: Engine, books: Books, store: LocalStore, settings: Settings):
        self.engine = engine
        self.books = books
        self.store = store
        self.share = settings.sampling_share
        self._requests: list[Request] = []
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()
        self._credit_seconds = 0.0
        self._costs: Counter[str] = Counter()

    def take_costs(self) -> dict[str, int]:
        """What was computed for each tenant while training waited, in token-equivalents, since it was last asked."""
        costs, self._costs = dict(self._costs), Counter()
        return costs

    def turn(self, *, training_seconds: float | None) -> bool:
        """One slice for everybody who waits; whether there was anything to do.

        `training_seconds` is what the last gang took, None when nothing trains: then sampling is not limited.
        """
        self._admit()
        if training_seconds is not None:
            earned = training_seconds * self.share / max(1 - self.share, 1e-9)
            self._credit_seconds = min(self._credit_seconds + earned, MAX_CREDIT_SECONDS)
            if self._credit_seconds <= 0:
                return False
        if not self._requests:
            return False
        began = time.monotonic()
        alone = [[request] for request in self._requests if request.is_suspect]
        for requests in [[request for request in self._requests if not request.is_suspect], *alone]:
            self._advance(requests)
        ended = [request for request in self._requests if request.sample.finish_reason]
        self._finish(ended)
        self._requests = [request for request in self._requests if not request.sample.finish_reason]
        if training_seconds is not None:
            self._credit_seconds -= time.monotonic() - began
        else:
            self._costs.clear()  # nobody had to wait for it
        return True

    def _admit(self) -> None:
        with self.books.glance() as connection:
            if not operations.any_pending(connection, self.engine.base.hash):
                return
        with self.books.write() as session:
            new = operations.start_pending(session, self.engine.base.hash, self.books.epoch)
        for operation in new:
            self._begin(operation)

    def _advance(self, requests: list[Request]) -> None:
        """One slice. When it fails its requests begin anew, each alone: the one at fault fails, the others do not."""
        try:
            advance(self.engine.base, [request.sample for request in requests], SLICE_TOKENS)
        except Exception:
            log.exception("sampling_failed")
            self._requests = [request for request in self._requests if request not in requests]
            for request in requests:
                if len(requests) > 1:
                    self._begin(request.operation, is_suspect=True)
                else:
                    self._fail(request.operation, _FAILED)
            return
        for request in requests:
            self._charge(request, len(requests))
            self._write(request, partial(self._append_tokens, request))

    def _charge(self, request: Request, num_sequences: int) -> None:
        """For what is not in its file yet: tokens drawn, and before the first ones its prompt."""
        num_tokens = len(request.sample.tokens) - request.written
        cost = request.prices.sample(num_tokens, num_sequences=num_sequences)
        if num_tokens and not request.written:
            cost += request.prices.forward(len(request.sample.prompt))
        self._costs[request.operation.tenant_id] += cost

    def _begin(self, operation: Operation, *, is_suspect: bool = False) -> None:
        try:
            request = self._prepare(operation, is_suspect)
        except (EngineError, OSError, SafetensorError) as error:
            log.error("adapter_unreadable", extra={"fields": {"id": operation.id, "reason": str(error)}})
            self._fail(operation, _UNREADABLE)
        except Exception:
            log.exception("sampling_failed")
            self._fail(operation, _FAILED)
        else:
            self._requests.append(request)
            if request.score is not None:
                self._write(request, partial(_append, request.result, {"prompt_logprobs": request.score}))

    def _fail(self, operation: Operation, problem: dict[str, str]) -> None:
        with self.books.write() as session:
            operations.finish(session, [operation.id], problem)

    def _prepare(self, operation: Operation, is_suspect: bool) -> Request:
        """Read what is asked, and score the prompt if that is asked too."""
        folder = self.store.path(operation.key)
        asked = json.loads((folder / "request.json").read_text())
        result = folder / operations.result_file(operation)
        result.unlink(missing_ok=True)  # of a failed pass
        adapter = self._adapter(operation.adapter_id)
        prices = prices_of(self.engine.base, adapter)
        sample = Sample(
            prompt=asked["tokens"],
            max_tokens=asked["max_tokens"],
            adapter=adapter,
            temperature=asked["temperature"],
            top_k=asked["top_k"],
            top_p=asked["top_p"],
            seed=asked["seed"],
            stop_tokens=frozenset(asked["stop_tokens"]),
        )
        score: list[float | None] | None = None
        if asked["logprobs"]:
            score = [None]
            if len(sample.prompt) > 1:
                (outcome,) = self.engine.forward([scoring(sample.prompt, adapter)])
                self._costs[operation.tenant_id] += prices.forward(len(sample.prompt))
                score += outcome.logprobs[0].tolist()
                if not outcome.logprobs[0].isfinite().all():
                    sample.finish_reason = DIVERGED
        return Request(operation, result, sample, prices, score, is_suspect)

    def _adapter(self, adapter_id: str | None) -> Adapter | None:
        if adapter_id is None:
            return None
        if adapter_id not in self._adapters:
            with self.books.read() as session:
                key = runs.adapter_key(session, adapter_id)
            if key is None:
                raise FileNotFoundError(f"{adapter_id} was deleted")
            self._adapters[adapter_id] = self.engine.load_adapter(self.store.path(key))
            if len(self._adapters) > KEPT_ADAPTERS:
                self._adapters.popitem(last=False)
        self._adapters.move_to_end(adapter_id)
        return self._adapters[adapter_id]

    def _append_tokens(self, request: Request) -> None:
        sample = request.sample
        if len(sample.tokens) > request.written and request.result.parent.exists():
            new = slice(request.written, len(sample.tokens))
            _append(request.result, {"tokens": sample.tokens[new], "logprobs": sample.logprobs[new]})
            request.written = len(sample.tokens)

    def _write(self, request: Request, append: Callable[[], None]) -> None:
        """Into its result file; a request whose answer the disk does not take fails."""
        try:
            append()
        except OSError as error:
            problem = _NO_ROOM if is_full(error) else _UNWRITTEN
            log.error(problem["code"], extra={"fields": {"id": request.operation.id, "reason": str(error)}})
            self._fail(request.operation, problem)
            self._requests = [one for one in self._requests if one is not request]

    def _finish(self, ended: list[Request]) -> None:
        if not ended:
            return
        for request in ended:
            if request.result.parent.exists():
                reason = {"finish_reason": request.sample.finish_reason}
                self._write(request, partial(_append, request.result, reason))
        ids = [request.operation.id for request in ended]
        prompts, sampled = Counter[str](), Counter[str]()
        for request in ended:
            prompts[request.operation.tenant_id] += len(request.sample.prompt)
            sampled[request.operation.tenant_id] += len(request.sample.tokens)
        diverged = [request.operation.id for request in ended if request.sample.finish_reason == DIVERGED]
        with self.books.write() as session:
            operations.finish(session, diverged, _DIVERGED)
            operations.finish(session, [id_ for id_ in ids if id_ not in diverged], None)
            accounts.meter_sampling(session, self.books.seat, prompts, sampled)


def _append(result: Path, line: dict[str, Any]) -> None:
    fault("answer.append")
    with result.open("a") as file:
        file.write(json.dumps(line) + "\n")
