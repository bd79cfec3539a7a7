"""The real app over a real database of each kind, with a base as a daemon would publish it."""

import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import text, update

from server import faults
from server.api.app import create_app, open_services
from server.api.services import Services
from server.db.migrate import upgrade
from server.db.session import Database
from server.db.tables import Base, Daemon, Table
from server.settings import Settings
from server.store import manifest
from tests.postgresql import PostgreSQL
from tests.tiny import write_tiny_tokenizer

ADMIN_KEY = "an-admin-key-of-more-than-32-characters"
HIDDEN, FEED_FORWARD, KEY_VALUE = 64, 96, 32
TARGETS = {
    "q_proj": [HIDDEN, HIDDEN],
    "k_proj": [KEY_VALUE, HIDDEN],
    "v_proj": [KEY_VALUE, HIDDEN],
    "o_proj": [HIDDEN, HIDDEN],
    "gate_proj": [FEED_FORWARD, HIDDEN],
    "up_proj": [FEED_FORWARD, HIDDEN],
    "down_proj": [HIDDEN, FEED_FORWARD],
}


class Caller(TestClient):
    """A client that sends one key. `tenant_id` is empty for the operator and for nobody."""

    def __init__(self, app: FastAPI, key: str | None, tenant_id: str = ""):
        super().__init__(app, headers={"Authorization": f"Bearer {key}"} if key else {})
        self.tenant_id = tenant_id
        self.key = key


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What touches the database runs on both kinds, unless its mark says that one is enough."""
    if "database_url" in metafunc.fixturenames:
        marked = metafunc.definition.get_closest_marker("databases")
        metafunc.parametrize("database_url", marked.args if marked else ["sqlite", "postgresql"], indirect=True)


@pytest.fixture(scope="session")
def emptied(postgresql: PostgreSQL, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], str]:
    """Empties the one PostgreSQL database of all tests here: to make a new one takes longer than most tests.

    So does TRUNCATE, which makes new files for each table and index.
    """
    url = postgresql.new_database()
    settings = Settings(data_dir=tmp_path_factory.mktemp("emptied"), database_url=url)
    upgrade(settings)
    engine = Database(settings.database).engine
    with engine.connect() as connection:
        sequences = connection.scalars(text("SELECT sequencename FROM pg_sequences")).all()
    deleted = [f"DELETE FROM {table.name}" for table in reversed(Table.metadata.sorted_tables)]
    statements = "; ".join([*deleted, *(f"SELECT setval('{name}', 1, false)" for name in sequences)])

    def empty() -> str:
        with engine.begin() as connection:
            connection.exec_driver_sql(statements)
        return url

    return empty


@pytest.fixture
def database_url(request: pytest.FixtureRequest) -> str | None:
    """Of an empty database; None is SQLite in the data directory."""
    if request.param == "sqlite":
        return None
    if request.param == "failover":
        return str(request.getfixturevalue("pair").url)
    url: str = request.getfixturevalue("emptied")()
    return url


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of SQLite with the tables and nothing in them: a copy of it is made in no time."""
    settings = Settings(data_dir=tmp_path_factory.mktemp("migrated"))
    upgrade(settings)
    path = Database(settings.database).path
    assert path is not None
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # all of it is in the one file
    return path


@pytest.fixture
def settings(tmp_path: Path, database_url: str | None, migrated: Path) -> Settings:
    (tmp_path / "data").mkdir()
    if database_url is None:
        shutil.copy(migrated, tmp_path / "data" / migrated.name)
    return Settings(data_dir=tmp_path / "data", admin_key=ADMIN_KEY, database_url=database_url)


@pytest.fixture(scope="session")
def routes(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    """The app without what a test keeps in it: to build its routes takes longer than most tests."""
    return create_app(Settings(data_dir=tmp_path_factory.mktemp("routes"), admin_key=ADMIN_KEY))


@pytest.fixture
def app(routes: FastAPI, settings: Settings) -> Iterator[FastAPI]:
    """The app over an empty database of this test's own."""
    routes.state.services = open_services(settings)
    yield routes
    routes.state.services.database.engine.dispose()


@pytest.fixture
def services(app: FastAPI) -> Services:
    return app.state.services


@pytest.fixture
def armed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which this process looks for faults."""
    path = tmp_path / "faults"
    monkeypatch.setattr(faults, "_FILE", str(path))
    return path


@pytest.fixture
def anonymous(app: FastAPI) -> Caller:
    return Caller(app, None)


@pytest.fixture
def admin(app: FastAPI) -> Iterator[Caller]:
    with Caller(app, ADMIN_KEY) as caller:
        yield caller


def new_tenant(app: FastAPI, admin: TestClient, name: str, share: float = 1.0) -> Caller:
    answer = admin.post("/admin/tenants", json={"name": name, "share": share})
    assert answer.status_code == 201, answer.text
    return Caller(app, answer.json()["key"], answer.json()["id"])


@pytest.fixture
def alice(app: FastAPI, admin: Caller) -> Iterator[Caller]:
    with new_tenant(app, admin, "alice") as caller:
        yield caller


@pytest.fixture
def bob(app: FastAPI, admin: Caller) -> Iterator[Caller]:
    with new_tenant(app, admin, "bob") as caller:
        yield caller


@pytest.fixture
def publish_base(services: Services) -> Callable[..., Base]:
    """A function that publishes a tiny base and a daemon just heard from, as `server.daemon` does.

    It takes the place of the daemons before, unless it comes `beside` them. `daemon` is the daemon's name;
    it has not loaded the base yet unless that is `published`.
    """

    def publish(
        *,
        hash: str = "0123abcd",
        template: bool = True,
        live: bool = True,
        beside: bool = False,
        daemon: str = "one",
        published: bool = True,
        state: str = "ready",
        detail: dict[str, Any] | None = None,
        seat: int = 1,
        **changes: Any,
    ) -> Base:
        key = f"bases/{hash}"
        folder = services.store.put(key, lambda folder: write_tiny_tokenizer(folder, template=template))
        now = time.time()
        base = Base(
            **{
                "hash": hash,
                "name": "tiny",
                "path": "/models/tiny",
                "folder_key": key,
                "dtype": "float32",
                "context": 256,
                "microbatch_tokens": 128,
                "parameters": 1000,
                "num_layers": 2,
                "targets": TARGETS,
                "fingerprint": {"device": "cpu", "threads": 2},
                "probe": {"float32": 100.0},
                "published_at": now,
                "activation": "silu",
                "memory": {
                    "weights": 4000,
                    "kept_per_token": 5000,
                    "backward_per_token": 2000,
                    "head": 100_000,
                    "recompute": False,
                    "fused": True,
                },
                "manifest": manifest(folder),
                **changes,
            }
        )
        with services.database.write() as session:
            session.merge(base)
            if not beside:
                session.execute(update(Daemon).where(Daemon.ended_at.is_(None)).values(ended_at=now))
            session.add(
                Daemon(
                    pid=1,
                    base_hash=hash if published else None,
                    state=state,
                    detail=detail or {},
                    floor=0.0,
                    started_at=now,
                    heartbeat_at=now,
                    ended_at=None if live else now,
                    expires_at=now + 15,
                    supervisor=None,
                    name=daemon,
                    rests_under=None,
                    seat=seat,
                )
            )
        return base

    return publish


@pytest.fixture
def base(publish_base: Callable[..., Base]) -> Base:
    """The usual one."""
    return publish_base()
