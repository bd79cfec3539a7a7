"""A server that the tests here share, and stop, kill and start again: a start takes longer than most of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.oracle import Trace
from tests.e2e.conftest import database
from tests.e2e.interrupted.disturbed import left_by, submit_all
from tests.e2e.server import Server


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What happens here happens on both kinds of database. PostgreSQL is slow, except where a mark names the kinds."""
    if "shared" in metafunc.fixturenames:
        marked = metafunc.definition.get_closest_marker("databases")
        kinds = marked.args if marked else ("sqlite", pytest.param("postgresql", marks=pytest.mark.slow))
        metafunc.parametrize("shared", kinds, indirect=True)


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
