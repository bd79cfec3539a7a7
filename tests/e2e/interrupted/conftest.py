"""A server that the tests here share, and stop, kill and start again: a start takes longer than most of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.server import Server


@pytest.fixture(scope="package")
def shared(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("interrupted"), base)
    try:
        yield server
    finally:
        server.end()


@pytest.fixture
def server(shared: Server) -> Server:
    """It runs, whatever the test before has done to it."""
    return shared.start()
