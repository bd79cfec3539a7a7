"""A server that the tests here share, and stop, kill and start again: a start takes longer than most of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.oracle import Trace
from tests.e2e.conftest import database, on_both
from tests.e2e.interrupted.disturbed import left_by, submit_all
from tests.e2e.server import Server


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    on_both(metafunc, "shared")


@pytest.fixture(scope="package")
def shared(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp(request.param), base, **database(request))
    try:
        yield server
    finally:
        server.end()


@pytest.fixture
def server(shared: Server) -> Server:
    """It runs, whatever the test before has done to it."""
    return shared.start()


@pytest.fixture(scope="package")
def known() -> dict[str, list[Trace]]:
    """What the jobs of a module leave when nothing happens, by its name."""
    return {}


@pytest.fixture
def undisturbed(request: pytest.FixtureRequest, server: Server, known: dict[str, list[Trace]]) -> list[Trace]:
    """What the module's `JOBS` leave when nothing happens: on either kind of database the same."""
    name = request.module.__name__
    if name not in known:
        known[name] = left_by(server, submit_all(server, request.module.JOBS))
    return known[name]
