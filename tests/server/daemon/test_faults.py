"""Faults stay home: a job's own end it alone, with what is left of it; nobody else's bits or memory change."""

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from engine import recovery
from engine.base_model import BaseModel
from engine.config import AdapterConfig
from engine.engine import Engine
from engine.run import Microbatch, Outcome, Run
from server import curriculum, doctor
from server.api.services import Services
from server.daemon import roster
from server.daemon.last_good import Good
from server.db.tables import Run as RunRow
from tests.server.conftest import Caller
from tests.server.daemon.conftest import (
    MIXTURE,
    PLAIN,
    Life,
    adapters,
    break_rows,
    events,
    final_hash,
    job,
    steps,
    submit,
)
from tests.server.making import upload

NewLife = Callable[..., Life]
WIDE = {"steps": 4, "rows": 36, "batch": 36}
"""Of a job whose optimizer step takes three microbatches of 228 tokens."""
NARROW = {"steps": 6, "batch": 2}
"""Of one whose microbatches have 114 tokens."""


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    return {}


@pytest.fixture
def alone(kept: dict[str, Any], new_life: NewLife, alice: Caller, services: Services) -> dict[str, Any]:
    """What jobs come to that nothing disturbs, and each step of a plain one of usual size."""
    if not kept:
        life = new_life()
        for name, adapter, shape in (
            ("mixture", MIXTURE, WIDE),
            ("plain", PLAIN, WIDE),
            ("narrow mixture", MIXTURE, NARROW),
            ("narrow plain", PLAIN, NARROW),
        ):
            id_ = submit(alice, adapter, **shape)
            life.finish()
            kept[name] = final_hash(services, id_)
        id_ = submit(alice, PLAIN, training={"checkpoint_every": 1, "keep_checkpoints": 100})
        life.finish()
        kept["states"] = {one.step: one.sha256 for one in adapters(services, id_)}
    return kept


class Cramped(Engine):
    """An engine on a machine where no pass has room for more tokens than this: the pass breaks off half-way."""

    def __init__(self, base: BaseModel, max_tokens: int):
        super().__init__(base)
        self.max_tokens = max_tokens
        self.sizes: list[int] = []

    def compute(
        self, train: Sequence[Microbatch], evaluate: Sequence[Microbatch]
    ) -> tuple[list[Outcome], list[Outcome]]:
        tokens = sum(one.num_tokens for one in [*train, *evaluate])
        self.sizes.append(tokens)
        if tokens <= self.max_tokens:
            return super().compute(train, evaluate)
        super().compute(train[:1], [])  # so far it came: that gradient is no whole one
        raise RuntimeError(f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {tokens}000 bytes.")

    @property
    def failed(self) -> list[bool]:
        return [size > self.max_tokens for size in self.sizes]


def cramp(life: Life, max_tokens: int) -> Cramped:
    engine = Cramped(life.roster.engine.base, max_tokens)
    life.loop.passes.engine = engine
    return engine


def test_a_gang_that_does_not_fit_rides_in_smaller_passes_and_later_ones_begin_with_the_size_that_fitted(
    alone: dict[str, Any], life: Life, alice: Caller, bob: Caller, services: Services
) -> None:
    engine = cramp(life, 300)
    mixture, plain = submit(alice, MIXTURE, **WIDE), submit(bob, PLAIN, **WIDE)
    life.finish()
    assert final_hash(services, mixture) == alone["mixture"]
    assert final_hash(services, plain) == alone["plain"]
    num_failed = sum(engine.failed)
    assert max(engine.sizes) > 2 * engine.max_tokens
    assert 2 <= num_failed <= 3
    assert not any(engine.failed[engine.failed.index(False) :])
    assert events(services, mixture)[-1] == "succeeded"
    assert steps(services, plain) == [1, 2, 3, 4]


def test_when_a_runs_first_pass_of_a_gang_fails_its_later_ones_wait(
    alone: dict[str, Any], life: Life, alice: Caller, services: Services
) -> None:
    engine = cramp(life, 300)
    life.loop.passes.limit.failed(912)
    mixture = submit(alice, MIXTURE, **WIDE)
    life.finish()
    assert engine.sizes[:4] == [456, 228, 228, 228]
    assert final_hash(services, mixture) == alone["mixture"]


def test_a_job_whose_single_microbatch_does_not_fit_fails_alone_with_the_bytes(
    alone: dict[str, Any], life: Life, alice: Caller, bob: Caller, services: Services
) -> None:
    large = upload(bob, [{"prompt": "Why? " * 30, "completion": "So. " * 10} for _ in range(4)])
    engine = cramp(life, 150)
    mixture, plain = submit(alice, MIXTURE, **NARROW), submit(bob, PLAIN, **NARROW)
    broken = submit(bob, PLAIN, dataset=large, batch=1)
    life.turn_until(lambda: job(services, broken).status == "failed")
    error = job(services, broken).error
    (size,) = {row["tokens"] for row in bob.get(f"/datasets/{large}/rows").json()["data"]}
    assert 150 < size <= 256
    assert error["code"] == "out_of_memory"
    assert f"{size} tokens" in error["message"]
    assert f"{size}000 bytes" in error["message"]
    assert job(services, broken).adapter_id is None
    before = len(engine.sizes)
    life.finish()
    assert final_hash(services, mixture) == alone["narrow mixture"]
    assert final_hash(services, plain) == alone["narrow plain"]
    assert not any(engine.failed[before + 1 :]), "the one is tried together with the other once more"


def test_passes_are_as_large_as_before_when_the_job_is_gone_that_took_the_memory(
    life: Life, alice: Caller, bob: Caller, services: Services
) -> None:
    large = upload(bob, [{"prompt": "Why? " * 30, "completion": "So. " * 10} for _ in range(4)])
    engine = cramp(life, 150)
    ids = [submit(alice, MIXTURE, **NARROW), submit(bob, PLAIN, **NARROW), submit(bob, PLAIN, dataset=large, batch=1)]
    life.turn_until(lambda: job(services, ids[2]).status == "failed")
    engine.max_tokens, before = 1000, len(engine.sizes)
    life.finish()
    assert max(engine.sizes[before:]) == 228


def test_an_adapter_that_does_not_fit_into_memory_fails_alone_with_the_bytes(
    alone: dict[str, Any], life: Life, alice: Caller, bob: Caller, services: Services
) -> None:
    class Full(Engine):
        def create_run(self, config: AdapterConfig, *arguments: Any) -> Run:
            if config.num_experts == 7:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return super().create_run(config, *arguments)

    life.roster.engine = Full(life.roster.engine.base)
    huge = submit(bob, {**MIXTURE, "num_experts": 7})
    mixture = submit(alice, MIXTURE, **WIDE)
    life.finish()
    error = job(services, huge).error
    assert (job(services, huge).status, error["code"]) == ("failed", "out_of_memory")
    layout = life.roster.engine.base.layout(AdapterConfig.from_dict(job(services, huge).adapter))
    assert f"{16 * layout.size} bytes" in error["message"]
    assert final_hash(services, mixture) == alone["mixture"]


class Starved(Engine):
    """Finds no memory for optimizer steps until so many have failed."""

    def __init__(self, base: BaseModel, num_failures: int):
        super().__init__(base)
        self.num_failures = num_failures

    def optim_step(self, run: Run, **arguments: Any) -> float:
        if self.num_failures:
            self.num_failures -= 1
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes.")
        return super().optim_step(run, **arguments)


def test_without_memory_for_a_step_or_a_copy_a_run_begins_anew_and_nobody_notices(
    alone: dict[str, Any],
    new_life: NewLife,
    alice: Caller,
    bob: Caller,
    services: Services,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    life = new_life(recovery_steps=2)
    mixture, plain = submit(alice, MIXTURE, **WIDE), submit(bob, PLAIN, **WIDE)
    life.loop.engine = Starved(life.roster.engine.base, 1)
    capture, failures = recovery.capture, iter([MemoryError])

    def scarce(run: Run) -> recovery.Snapshot:
        for failure in failures:
            raise failure
        return capture(run)

    monkeypatch.setattr(recovery, "capture", scarce)
    life.finish()
    assert final_hash(services, mixture) == alone["mixture"]
    assert final_hash(services, plain) == alone["plain"]
    assert (events(services, mixture) + events(services, plain)).count("waiting") == 2
    assert steps(services, plain) == steps(services, mixture) == [1, 2, 3, 4]


def test_a_run_alone_in_memory_that_finds_none_for_its_step_fails(life: Life, bob: Caller, services: Services) -> None:
    life.loop.engine = Starved(life.roster.engine.base, 1)
    large = submit(bob, PLAIN, steps=2)
    life.finish()
    error = job(services, large).error
    assert error["code"] == "out_of_memory"
    layout = life.roster.engine.base.layout(AdapterConfig.from_dict(job(services, large).adapter))
    assert f"{16 * layout.size} bytes" in error["message"]
    next_ = submit(bob, PLAIN, steps=2)
    life.finish()
    assert job(services, next_).status == "succeeded"


def test_a_job_that_is_paused_without_memory_for_a_copy_goes_on_from_its_last_point(
    alone: dict[str, Any], new_life: NewLife, bob: Caller, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = new_life(recovery_steps=2)
    plain = submit(bob, PLAIN, **WIDE)
    life.turn_until(lambda: bool(life.roster.residents) and life.step_of(plain) == 3)
    bob.post(f"/jobs/{plain}/pause")
    with monkeypatch.context() as patch:
        patch.setattr(recovery, "capture", lambda run: np.empty(2**50))
        life.turn()
    assert (job(services, plain).status, events(services, plain)[-1]) == ("paused", "paused")
    bob.post(f"/jobs/{plain}/resume")
    life.finish()
    assert final_hash(services, plain) == alone["plain"]
    assert steps(services, plain) == [1, 2, 3, 4]


def test_a_gradient_that_is_no_number_ends_its_job_with_the_state_before_it(
    alone: dict[str, Any], new_life: NewLife, alice: Caller, bob: Caller, services: Services
) -> None:
    life = new_life(token_budget=512, recovery_steps=0)
    broken, mixture = submit(bob, PLAIN, training={"checkpoint_every": 12}), submit(alice, MIXTURE, **WIDE)
    life.turn_until(lambda: job(services, broken).step == 3)
    spoil_gradient(life, broken)
    life.finish()
    answer = bob.get(f"/jobs/{broken}").json()
    assert (answer["status"], answer["error"]["code"]) == ("failed", "diverged")
    assert answer["adapter_id"] in answer["error"]["message"]
    assert answer["adapter_sha256"] == alone["states"][3]
    (left,) = adapters(services, broken)
    assert (left.id, left.step, left.final) == (answer["adapter_id"], 3, False)
    assert events(services, broken)[-2:] == ["checkpoint", "failed"]
    assert steps(services, broken) == [1, 2, 3]
    assert bob.get(f"/jobs/{broken}/checkpoints").json()["data"][0]["id"] == left.id
    assert bob.get(f"/jobs/{broken}/adapter").status_code == 200
    assert final_hash(services, mixture) == alone["mixture"]
    assert not services.store.path("recovery").exists() or not list(services.store.path("recovery").glob("*/*"))


def spoil_gradient(life: Life, job_id: str) -> None:
    """As if the backward of the next pass overflowed: the loss stays what it is."""
    run = life.resident(job_id).run
    run.gradient[5] = float("inf")


@pytest.mark.parametrize(
    ("at", "recovery_steps", "checkpoint_every", "left"),
    [(7, 5, 12, 5), (7, 5, 6, 6), (4, 0, 2, 4), (5, 0, 2, 4), (5, 0, 12, None), (0, 5, 1, None)],
    ids=["a recovery point", "a newer checkpoint", "a checkpoint just made", "a checkpoint", "nothing", "no step yet"],
)
def test_when_the_weights_are_no_numbers_the_newest_state_that_is_whole_is_left(
    at: int,
    recovery_steps: int,
    checkpoint_every: int,
    left: int | None,
    alone: dict[str, Any],
    new_life: NewLife,
    bob: Caller,
    services: Services,
) -> None:
    life = new_life(recovery_steps=recovery_steps)
    training = {"checkpoint_every": checkpoint_every, "keep_checkpoints": 100}
    broken = submit(bob, PLAIN, training=training)
    with services.database.read() as session:
        life.roster.attach(session.query(RunRow).one().id)
    life.turn_until(lambda: life.step_of(broken) == at)
    life.resident(broken).run.adapter.flat[7] = float("nan")
    before = [one.id for one in adapters(services, broken)]
    life.finish()
    answer = bob.get(f"/jobs/{broken}").json()
    assert (answer["status"], answer["error"]["code"]) == ("failed", "diverged")
    assert f"step {at + 1}" in answer["error"]["message"]
    assert answer["adapter_sha256"] == alone["states"].get(left)
    assert ("No adapter is left" in answer["error"]["message"]) is (left is None)
    is_new = left == 5
    assert [one.id for one in adapters(services, broken)] == before + [answer["adapter_id"]] * is_new


def test_a_checkpoint_that_is_deleted_while_it_is_chosen_is_not_what_is_left(
    alone: dict[str, Any], new_life: NewLife, bob: Caller, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = new_life(recovery_steps=0)
    broken = submit(bob, PLAIN, training={"checkpoint_every": 2, "keep_checkpoints": 100})
    life.turn_until(lambda: bool(life.roster.residents) and life.step_of(broken) == 5)
    life.resident(broken).run.adapter.flat[7] = float("nan")
    older, newest = adapters(services, broken)
    choose = roster.last_good

    def choose_and_delete(*arguments: Any) -> Good | None:
        good = choose(*arguments)
        bob.delete(f"/adapters/{newest.id}")
        return good

    monkeypatch.setattr(roster, "last_good", choose_and_delete)
    life.finish()
    answer = bob.get(f"/jobs/{broken}").json()
    assert (answer["error"]["code"], answer["adapter_id"]) == ("diverged", older.id)
    assert answer["adapter_sha256"] == alone["states"][2]
    assert older.id in answer["error"]["message"]
    assert [one.id for one in adapters(services, broken)] == [older.id]
    assert doctor.examine(services.database, services.store) == []


def test_weights_that_are_finite_but_give_none_on_the_rows_are_no_good_state(
    life: Life, bob: Caller, services: Services
) -> None:
    broken = submit(bob, PLAIN, training={"checkpoint_every": 2})
    life.turn_until(lambda: bool(life.roster.residents) and life.step_of(broken) == 3)
    life.resident(broken).run.adapter.flat.fill_(1e30)
    life.finish()
    (left,) = adapters(services, broken)
    assert (left.step, job(services, broken).adapter_id) == (2, left.id)


def test_a_row_that_breaks_the_pass_is_found_also_when_the_step_takes_several_gangs(
    alone: dict[str, Any], new_life: NewLife, alice: Caller, bob: Caller, services: Services
) -> None:
    life = new_life(token_budget=512)
    mixture, broken = submit(alice, MIXTURE, **WIDE), submit(bob, PLAIN, rows=60, batch=60, steps=3)
    engine = cramp(life, 10**6)
    order = curriculum.rows_of_step(0, mixture=curriculum.Mixture.of(None, 60), batch_size=60, seed=42)
    break_rows(services, broken, order[-1])  # in the last microbatch of the step
    life.finish()
    assert job(services, broken).error["code"] == "pass_failed"
    assert engine.sizes[-2:] == [456, 228], "microbatches ride together again"
    assert final_hash(services, mixture) == alone["mixture"]


def test_the_memory_of_an_ended_run_is_given_back_at_once(
    life: Life, alice: Caller, bob: Caller, services: Services
) -> None:
    ids = [submit(alice, MIXTURE, steps=4), submit(bob, PLAIN, steps=4), submit(bob, PLAIN, steps=4)]
    life.turn_until(lambda: len(life.roster.residents) == 3 and life.step_of(ids[0]) == 2)
    runs = [life.resident(id_).run for id_ in ids]
    tensors = [t for run in runs for t in (run.adapter.flat, run.gradient, run.optimizer.first, run.optimizer.second)]
    storages = [weakref.ref(tensor) for tensor in tensors]
    runs[1].adapter.flat[3] = float("nan")
    bob.post(f"/jobs/{ids[2]}/cancel")
    gc.collect()
    gc.disable()
    try:
        del runs, tensors
        life.finish()
        assert [job(services, id_).status for id_ in ids] == ["succeeded", "failed", "cancelled"]
        assert [storage() is None for storage in storages] == [True] * 12
    finally:
        gc.enable()
