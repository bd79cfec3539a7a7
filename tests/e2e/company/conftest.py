"""A running server that the tests here share: they bring their own tenants, and neither stop nor drain it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import database, on_both
from tests.e2e.server import Server


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    on_both(metafunc, "server")


@pytest.fixture(scope="package")
def server(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), base, **database(request))
    try:
        yield server.start()
    finally:
        server.end()
