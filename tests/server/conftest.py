"""The real app over a real database in a temporary directory, with a base as a daemon would publish it."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from server.api.app import create_app, open_services
from server.api.services import Services
from server.db.tables import Base, Daemon
from server.settings import Settings
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


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", admin_key=ADMIN_KEY)


@pytest.fixture(scope="session")
def routes(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    """The app without what a test keeps in it: to build its routes takes longer than most tests."""
    return create_app(Settings(data_dir=tmp_path_factory.mktemp("routes"), admin_key=ADMIN_KEY))


@pytest.fixture
def app(routes: FastAPI, settings: Settings) -> FastAPI:
    """The app over an empty database of this test's own."""
    routes.state.services = open_services(settings)
    return routes


@pytest.fixture
def services(app: FastAPI) -> Services:
    return app.state.services


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
    """A function that publishes a tiny base and a daemon just heard from, as `server.daemon` does."""

    def publish(
        *,
        hash: str = "0123abcd",
        template: bool = True,
        live: bool = True,
        detail: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Base:
        key = f"bases/{hash}"
        services.store.put(key, lambda folder: write_tiny_tokenizer(folder, template=template))
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
                "fingerprint": {"device": "cpu"},
                "probe": {"float32": 100.0},
                "published_at": now,
                **changes,
            }
        )
        with services.database.write() as session:
            session.merge(base)
            session.add(
                Daemon(
                    pid=1,
                    base_hash=hash,
                    state="ready",
                    detail=detail or {},
                    floor=0.0,
                    started_at=now,
                    heartbeat_at=now,
                    ended_at=None if live else now,
                )
            )
        return base

    return publish


@pytest.fixture
def base(publish_base: Callable[..., Base]) -> Base:
    """The usual one."""
    return publish_base()
