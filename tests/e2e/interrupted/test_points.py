"""Every named point of the server's code, each kind of fault there: no job ends otherwise than it would have."""

from typing import Any

import pytest

from benchmarks.oracle import Trace, anomalies
from mixloom import MixloomError, ServerUnreachable
from server.faults import POINTS, Fault, Kind, arm
from tests.e2e.interrupted.disturbed import SHORT, left_by, let_an_hour_pass, submit_all
from tests.e2e.server import Server, wait_for

KINDS: tuple[Kind, ...] = ("kill", "EIO", "ENOSPC", "delay")
ANSWERS = "answer.append"
"""The one point that no job comes by."""
OFTEN = {"record.begin-kill", "put.synced-recovery-EIO", "put.renamed-adapters-ENOSPC", "claim.done-delay"}
"""What also the quick tests do; only the first one ends the daemon, whose start takes seconds."""


@pytest.fixture(scope="module")
def undisturbed(shared: Server) -> list[Trace]:
    """What the jobs of `SHORT` leave when nothing happens."""
    return left_by(shared.start(), submit_all(shared, SHORT))


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


@pytest.mark.parametrize(("point", "about", "kind"), walk())
def test_a_fault_at_any_point_changes_nothing_of_what_is_left(
    point: str, about: str, kind: Kind, server: Server, undisturbed: list[Trace]
) -> None:
    arm(server.faults, Fault(point=point, kind=kind, about=about, after=1))
    assert left_by(server, submit_all(server, SHORT)) == undisturbed
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
    jobs = submit_all(server, SHORT)
    try:
        outcome = "right" if tokens() == right else "wrong"
    except MixloomError as error:
        outcome = f"{error.status} {error.code}"
    assert outcome in outcomes
    assert left_by(server, jobs) == undisturbed
    assert '"times": 0' in server.faults.read_text(), "it has struck"


@pytest.mark.slow
@pytest.mark.parametrize("point", [point for point in POINTS if point.startswith("put.")])
@pytest.mark.parametrize("prefix", ["datasets", "jobs"])
def test_an_api_that_is_killed_in_a_request_leaves_nothing_of_it(prefix: str, point: str, server: Server) -> None:
    nouns = "SELECT id FROM jobs UNION SELECT id FROM datasets ORDER BY id"
    before = server.rows(nouns)
    arm(server.faults, Fault(point=point, kind="kill", about=prefix))
    with pytest.raises(ServerUnreachable):
        submit_all(server, {"alice": SHORT["alice"]})
    assert server.process is not None
    server.process.wait()
    let_an_hour_pass(server)
    server.start()
    wait_for(lambda: not anomalies(server), why=lambda: str(anomalies(server)))
    assert len(server.rows(nouns)) == len(before) + (prefix == "jobs"), "the data set was accepted"
