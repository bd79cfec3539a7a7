"""Every named point of the server's code, each kind of fault there: no job ends otherwise than it would have."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.oracle import Trace
from mixloom import MixloomError, ServerUnreachable
from server.faults import POINTS, Fault, Kind, arm
from tests.e2e.interrupted.disturbed import VALIDATED, Configs, left_by, let_an_hour_pass, submit_all
from tests.e2e.making import MIXTURE, PLAIN, dataset, submit
from tests.e2e.server import Server, is_gone, wait_for

JOBS: Configs = {"alice": [(MIXTURE, 12, VALIDATED)], "bob": [(PLAIN, 14, {})]}

KINDS: tuple[Kind, ...] = ("kill", "EIO", "ENOSPC", "delay")
ANSWERS = "answer.append"
"""The one point that no job comes by."""
OFTEN = {"record.begin-kill", "put.synced-recovery-EIO", "put.renamed-adapters-ENOSPC", "claim.done-delay"}
"""What also the quick tests do; only the first one ends the daemon, whose start takes seconds."""


def walk() -> list[Any]:
    """Every point, those of a folder that is published by what it holds; and what goes wrong there."""
    cases = []
    for point in sorted(POINTS.keys() - {ANSWERS}):
        for about in ("recovery", "adapters") if point.startswith("put.") else ("",):
            for kind in KINDS:
                name = "-".join(filter(None, (point, about, kind)))
                marks = () if name in OFTEN else pytest.mark.slow
                cases.append(pytest.param(point, about, kind, id=name, marks=marks))
    return cases


@pytest.mark.databases("sqlite", "postgresql")
@pytest.mark.parametrize(("point", "about", "kind"), walk())
def test_a_fault_at_any_point_changes_nothing_of_what_is_left(
    point: str, about: str, kind: Kind, server: Server, undisturbed: list[Trace]
) -> None:
    arm(server.faults, Fault(point=point, kind=kind, about=about, after=1))
    assert left_by(server, submit_all(server, JOBS)) == undisturbed
    assert '"times": 0' in server.faults.read_text(), "it has struck"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "outcomes"),
    [
        ("kill", {"right", "503 no_daemon"}),  # if the next daemon is long in coming
        ("EIO", {"500 answer_not_written"}),
        ("ENOSPC", {"507 disk_full"}),
        ("delay", {"right"}),
    ],
)
def test_a_fault_in_an_answer_is_said_and_touches_no_job(
    kind: Kind, outcomes: set[str], server: Server, undisturbed: list[Trace]
) -> None:
    client = server.tenant("alice")

    def tokens() -> object:
        return client.generate("base", "What is 003?", max_tokens=24)["tokens"]

    right = tokens()
    arm(server.faults, Fault(point=ANSWERS, kind=kind, after=1))
    jobs = submit_all(server, JOBS)
    try:
        outcome = "right" if tokens() == right else "wrong"
    except MixloomError as error:
        outcome = f"{error.status} {error.code}"
    assert outcome in outcomes
    assert left_by(server, jobs) == undisturbed
    assert '"times": 0' in server.faults.read_text(), "it has struck"


REFUSALS = {"kill": "nobody answers", "EIO": "500 internal_error", "ENOSPC": "507 disk_full", "delay": "accepted"}
NOUNS = {
    "datasets": "SELECT id FROM datasets",
    "jobs": "SELECT id FROM jobs",
    "uploads": "SELECT id FROM adapters WHERE key LIKE 'uploads/%'",
    "operations": "SELECT id FROM operations",
}
"""What the API alone keeps, by the first part of its key; the last until it is answered."""
OF_A_FOLDER = [point for point in POINTS if point.startswith("put.")]


def requests() -> list[Any]:
    """Every point at which something is kept of a request, what it keeps, and what goes wrong."""
    often = {("jobs", "put.synced", "kill"), ("operations", "put.renamed", "EIO")}  # what also the quick tests do
    cases = itertools.product(NOUNS, OF_A_FOLDER, KINDS)
    return [pytest.param(*case, marks=() if case in often else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(("prefix", "point", "kind"), requests())
def test_a_fault_in_a_request_that_keeps_something_is_said_leaves_nothing_of_it_and_touches_no_job(
    prefix: str, point: str, kind: Kind, server: Server, undisturbed: list[Trace], tmp_path: Path
) -> None:
    client, jobs = server.tenant("alice"), submit_all(server, JOBS)
    data = dataset(client, tmp_path)
    (adapter, *_) = server.rows("SELECT key FROM adapters WHERE final AND key LIKE 'adapters/%' LIMIT 1")
    send: Callable[[], object] = {
        "datasets": lambda: dataset(client, tmp_path),
        "jobs": lambda: submit(client, data, PLAIN, 1),
        "uploads": lambda: client.adapters.upload(server.data / adapter["key"]),
        "operations": lambda: client.generate("base", "What is 003?", max_tokens=2),
    }[prefix]
    before, daemon = len(server.rows(NOUNS[prefix])), server.daemon_pid
    arm(server.faults, Fault(point=point, kind=kind, about=prefix))
    assert outcome_of(send) == REFUSALS[kind]
    assert '"times": 0' in server.faults.read_text(), "it has struck"
    if kind == "kill":
        assert server.process is not None
        assert daemon is not None
        server.process.wait()
        wait_for(lambda: is_gone(daemon))
        let_an_hour_pass(server)
        server.start()
    send()
    kept = 0 if prefix == "operations" else (kind == "delay") + 1
    assert len(server.rows(NOUNS[prefix])) == before + kept
    assert left_by(server, jobs) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("point", OF_A_FOLDER)
def test_a_fault_while_a_start_writes_the_tokenizer_anew_delays_it_and_touches_no_job(
    point: str, kind: Kind, server: Server, undisturbed: list[Trace]
) -> None:
    jobs = submit_all(server, JOBS)
    assert server.stop() == 0
    (base,) = server.rows("SELECT folder_key FROM bases ORDER BY published_at DESC LIMIT 1")  # others were served too
    folder = server.data / base["folder_key"]
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / "tokenizer.json").write_bytes(files["tokenizer.json"][:-1])
    arm(server.faults, Fault(point=point, kind=kind, about="bases"))
    server.start()
    assert '"times": 0' in server.faults.read_text(), "it has struck"
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == files
    assert left_by(server, jobs) == undisturbed


def outcome_of(send: Callable[[], object]) -> str:
    """What a request comes to, as its sender sees it."""
    try:
        send()
    except ServerUnreachable:
        return "nobody answers"
    except MixloomError as error:
        return f"{error.status} {error.code}"
    return "accepted"
