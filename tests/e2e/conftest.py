"""Servers for the tests. Those of a folder share one: `company` leaves it running, `interrupted` does not."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.base_folder import write_tiny_base
from tests.e2e.server import Server

NewServer = Callable[..., Server]


BOTH = ("sqlite", pytest.param("postgresql", marks=pytest.mark.slow))
"""Kinds of database: what takes long on the second is slow there."""


def on_both(metafunc: pytest.Metafunc, fixture: str) -> None:
    """What uses a folder's server happens on both kinds of database: on those that a mark names, else on `BOTH`."""
    if fixture in metafunc.fixturenames:
        marked = metafunc.definition.get_closest_marker("databases")
        metafunc.parametrize(fixture, marked.args if marked else BOTH, indirect=True)


def database(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Settings for a new database of the kind that a fixture's parameter names.

    On PostgreSQL a server waits for the lease of what another one's daemon held: not for long here.
    """
    if request.param == "sqlite":
        return {}
    return {"database_url": request.getfixturevalue("postgresql").new_database(), "lease_seconds": 10}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base model."""
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def new_server(base: Path, tmp_path: Path) -> Iterator[NewServer]:
    """Makes servers of a test's own, not yet started; each `new_server(name="b", base=…, **settings)`."""
    made: list[Server] = []

    def make(*, name: str = "server", base: Path | str = base, **settings: Any) -> Server:
        made.append(Server(tmp_path / name, base, **settings))
        return made[-1]

    yield make
    for server in made:
        server.end()
