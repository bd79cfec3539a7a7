"""kill -9 of anything, at any moment: every accepted job ends with the bytes that it would have had."""

import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.making import MIXTURE, NARROW, PLAIN, WIDE, dataset, submit
from tests.e2e.server import Server, is_gone, wait_for

CONFIGS = {"alice": [(MIXTURE, 20), (PLAIN, 110)], "bob": [(WIDE, 40), (NARROW, 75)]}
"""Jobs of two tenants: what, and how many steps. The longest outlasts all the kills."""


@dataclass(frozen=True)
class Disturbed:
    """Jobs that something happens to, and the hashes that they are to have in the end."""

    server: Server
    jobs: list[str]
    undisturbed: list[str]

    def check(self) -> None:
        """All is in the end as if nothing had been."""
        assert self.server.finish(*self.jobs) == self.undisturbed
        totals = [steps for configs in CONFIGS.values() for _, steps in configs]
        for job, total in zip(self.jobs, totals, strict=True):
            assert self.server.metric_steps(job) == list(range(1, total + 1))
        wait_for(lambda: not list((self.server.data / "recovery").glob("*/*")))
        assert not list(self.server.data.rglob("*.tmp"))


@pytest.fixture(scope="module")
def shared(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, list[str]]]:
    """A server, and what the jobs of `CONFIGS` come to undisturbed."""
    server = Server(tmp_path_factory.mktemp("kill"), base)
    try:
        yield server.start(), server.finish(*submit_all(server))
    finally:
        server.end()


@pytest.fixture
def killed(shared: tuple[Server, list[str]]) -> Disturbed:
    """The same jobs, just submitted again."""
    server, undisturbed = shared
    return Disturbed(server.start(), submit_all(server), undisturbed)


def submit_all(server: Server) -> list[str]:
    return [
        submit(server.tenant(name), dataset(server.tenant(name), server.folder), adapter, steps)
        for name, configs in CONFIGS.items()
        for adapter, steps in configs
    ]


def test_kills_of_the_api_the_daemon_and_both_and_a_daemon_that_is_stopped_change_no_byte(killed: Disturbed) -> None:
    server, longest = killed.server, killed.jobs[1]
    chance = random.Random(5)
    victims = [("api",), ("daemon",), ("api", "daemon")] * 3
    for whom, moment in zip(victims, [8, 3, 12, 7, 10, 1, 8, 6, 9], strict=True):
        wait_for(lambda moment=moment: server.num_gangs() >= moment)
        time.sleep(chance.random() * 0.1)
        assert server.status(longest) == "running", "a job that trains when it happens"
        server.kill(*whom)
        server.start()
    wait_for(lambda: server.num_gangs() >= 7)
    stop_the_daemon_and_restart_the_api(server, wakes=False)
    killed.check()
    attempts = server.rows("SELECT attempts FROM runs WHERE job_id = ?", longest)[0]["attempts"]
    assert attempts == 11


def test_who_asks_while_the_daemon_is_killed_has_the_answer_of_the_next_one(shared: tuple[Server, list[str]]) -> None:
    server = shared[0].start()
    client = server.tenant("asking")

    def ask(n: int) -> list[int]:
        tokens: list[int] = client.generate("base", f"What is {n}?", max_tokens=100)["tokens"]
        return tokens

    alone = [ask(n) for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(ask, range(4))
        wait_for(lambda: server.rows("SELECT * FROM operations WHERE status = 'running'"))
        server.kill("daemon")
        assert list(answers) == alone
    server.wait_until_ready()


@pytest.mark.slow
def test_a_stopped_daemon_that_wakes_after_the_api_was_restarted_ends_itself(killed: Disturbed) -> None:
    wait_for(lambda: killed.server.num_gangs() >= 7)
    stop_the_daemon_and_restart_the_api(killed.server, wakes=True)
    killed.check()


def stop_the_daemon_and_restart_the_api(server: Server, *, wakes: bool) -> None:
    """SIGSTOP, kill -9, start. One that never wakes is ended by the new daemon, which waits for its lock."""
    old, before = server.daemon_pid, len(server.log)
    assert old is not None
    os.kill(old, signal.SIGSTOP)
    server.kill("api")
    server.spawn()
    if wakes:
        wait_for(lambda: "waiting_for_lock" in server.log[before:])
        assert not is_gone(old)
        os.kill(old, signal.SIGCONT)
    server.wait_until_ready()
    assert is_gone(old)
    assert ("killing_orphan" in server.log[before:]) is not wakes
