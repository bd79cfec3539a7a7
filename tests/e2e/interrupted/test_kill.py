"""kill -9 of anything, at any moment: every accepted job ends with the bytes that it would have had."""

import contextlib
import itertools
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.oracle import Trace, not_leased
from mixloom import ServerUnreachable
from tests.e2e.interrupted.disturbed import VALIDATED, Configs, left_by, let_an_hour_pass, submit_all
from tests.e2e.making import MIXTURE, NARROW, PLAIN, WIDE, dataset, submit
from tests.e2e.server import Server, is_gone, is_stopped, wait_for

JOBS: Configs = {
    "alice": [(MIXTURE, 20, {}), (PLAIN, 110, VALIDATED)],
    "bob": [(WIDE, 40, VALIDATED), (NARROW, 75, {})],
}
"""The second outlasts many kills."""


@dataclass(frozen=True)
class Disturbed:
    """Jobs that something happens to, and what they are to leave in the end."""

    server: Server
    jobs: list[str]
    undisturbed: list[Trace]

    def check(self) -> None:
        """All is in the end as if nothing had been."""
        assert left_by(self.server, self.jobs) == self.undisturbed


@pytest.fixture
def killed(server: Server, undisturbed: list[Trace]) -> Disturbed:
    """The same jobs, just submitted again."""
    return Disturbed(server, submit_all(server, JOBS), undisturbed)


TWO, NINE = [8, 1], [8, 3, 12, 7, 10, 1, 8, 6, 9]
"""Gangs of a daemon's life before something is killed; the next quick test kills both at once."""


@pytest.mark.parametrize("moments", [TWO, pytest.param(NINE, marks=pytest.mark.slow)], ids=["two", "nine"])
def test_kills_of_the_api_the_daemon_and_both_and_a_daemon_that_is_stopped_change_no_byte(
    killed: Disturbed, moments: list[int]
) -> None:
    server, longest = killed.server, killed.jobs[1]
    chance = random.Random(5)
    victims = itertools.cycle([("api",), ("daemon",), ("api", "daemon")])
    for whom, moment in zip(victims, moments, strict=False):
        wait_for(lambda moment=moment: server.num_gangs() >= moment and server.status(longest) == "running")
        time.sleep(chance.random() * 0.1)
        assert server.status(longest) == "running", "a job that trains when it happens"
        server.kill(*whom)
        if "api" in whom and "database_url" in server.settings:
            let_an_hour_pass(server)
        server.start()
        assert list(not_leased(server)) == []
    wait_for(lambda: server.num_gangs() >= 7)
    stop_the_daemon_and_restart_the_api(server, wakes=False)
    killed.check()
    attempts = server.rows("SELECT attempts FROM runs WHERE job_id = ?", longest)[0]["attempts"]
    assert attempts == len(moments) + 2


@pytest.mark.slow
def test_who_asks_while_the_daemon_is_killed_has_the_answer_of_the_next_one(server: Server) -> None:
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


def test_what_was_accepted_is_there_after_a_kill_and_nothing_is_there_by_halves(server: Server, tmp_path: Path) -> None:
    client = server.tenant("hasty")
    accepted: list[tuple[str, str]] = []

    def hurry(folder: Path) -> None:
        folder.mkdir()
        with contextlib.suppress(ServerUnreachable):
            while True:
                data = dataset(client, folder)
                accepted.append((data, submit(client, data, PLAIN, 1)))

    threads = [threading.Thread(target=hurry, args=(tmp_path / str(n),)) for n in range(3)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(accepted) >= 10)
    server.kill("api", "daemon")
    for thread in threads:
        thread.join(30)
    let_an_hour_pass(server)
    server.start()
    left_by(server, [job for _, job in accepted])
    for data, job in accepted:
        assert client.datasets.get(data)["rows"] == 10
        assert client.jobs.get(job)["adapter_sha256"]
    known = server.rows("SELECT id FROM jobs UNION SELECT id FROM datasets")
    for job in client.jobs.iterate():
        assert (server.data / "jobs" / job["id"] / "train.safetensors").exists()
    assert {one["id"] for one in known} >= {name for pair in accepted for name in pair}


@pytest.mark.databases("sqlite")  # where the next one waits for its lock; elsewhere see tests/e2e/test_daemons.py
@pytest.mark.slow
def test_a_stopped_daemon_that_wakes_after_the_api_was_restarted_ends_itself(killed: Disturbed) -> None:
    wait_for(lambda: killed.server.num_gangs() >= 7)
    stop_the_daemon_and_restart_the_api(killed.server, wakes=True)
    killed.check()


def stop_the_daemon_and_restart_the_api(server: Server, *, wakes: bool) -> None:
    """SIGSTOP, kill -9, start. One that never wakes is ended by the new daemon, which waits for its lock.

    On PostgreSQL it waits for nothing but the lease of the old one's runs.
    """
    old, before = server.daemon_pid, len(server.log)
    assert old is not None
    os.kill(old, signal.SIGSTOP)
    wait_for(lambda: is_stopped(old))  # one that waits for the disk runs until then, and sees its parent die
    server.kill("api")
    if "database_url" in server.settings:
        let_an_hour_pass(server)
        server.start()
        wait_for(lambda: not server.rows("SELECT * FROM daemons WHERE pid = ? AND ended_at IS NULL", old))
        os.kill(old, signal.SIGKILL)
        return
    server.spawn()
    if wakes:
        wait_for(lambda: "waiting_for_lock" in server.log[before:])
        assert not is_gone(old)
        os.kill(old, signal.SIGCONT)
    server.wait_until_ready()
    assert is_gone(old)
    assert ("killing_orphan" in server.log[before:]) is not wakes
