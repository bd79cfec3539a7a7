"""A daemon that has nothing to do: it looks only when something was written, and then at once."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest

from server.api.services import Services
from server.daemon import loop
from tests.server.conftest import Caller
from tests.server.daemon.conftest import PLAIN, Gate, Life, job, submit
from tests.server.daemon.test_outages import wait_until

MANY_SECONDS = 10 * loop.IDLE_SECONDS


@pytest.fixture(autouse=True)
def for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but what was written ends a rest."""
    monkeypatch.setattr(loop, "REST_SECONDS", 3600.0)


@contextmanager
def running(life: Life, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Its loop, in a thread; gives the number of its turns."""
    turns, turn = [], life.loop.turn

    def counted() -> bool:
        turns.append(1)
        return turn()

    monkeypatch.setattr(life.loop, "turn", counted)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(life.loop.run)
        try:
            yield lambda: len(turns)
        finally:
            life.loop.stopping.set()
            done.result()


def test_an_idle_daemon_takes_a_turn_only_after_something_was_written(
    life: Life, alice: Caller, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rests() -> bool:
        before = turns()
        time.sleep(MANY_SECONDS)
        return turns() == before

    with running(life, monkeypatch) as turns:
        for _ in range(2):
            wait_until(rests)
            id_ = submit(alice, PLAIN, steps=2)
            wait_until(partial(succeeded, services, id_))


def succeeded(services: Services, id_: str) -> bool:
    return job(services, id_).status == "succeeded"


def test_a_daemon_that_has_files_to_write_does_not_rest(
    life: Life, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.close()
    with running(life, monkeypatch) as turns:
        wait_until(lambda: turns() > 3)
        gate.open()
