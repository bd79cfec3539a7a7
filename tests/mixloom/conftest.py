"""The real API on a real port, with a base as a daemon would publish it, and the command line over it."""

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI

from mixloom import Client
from mixloom.cli.main import main
from server.api.app import create_app, open_services
from server.api.services import Services
from server.db.tables import Adapter, Job
from server.ids import new_id
from server.settings import Settings
from tests.server.conftest import ADMIN_KEY, base, migrated, publish_base

__all__ = ["base", "migrated", "publish_base"]  # fixtures


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own, so that no login of this machine is seen or changed."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / ".config"))
    monkeypatch.delenv("MIXLOOM_URL", raising=False)
    monkeypatch.delenv("MIXLOOM_API_KEY", raising=False)
    return home


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FastAPI, str]]:
    """The app behind a real port, and its URL. What it serves, each test puts into it."""
    app = create_app(Settings(data_dir=tmp_path_factory.mktemp("server"), admin_key=ADMIN_KEY))
    with serving(app) as port:
        yield app, f"http://127.0.0.1:{port}"


@contextmanager
def serving(app: FastAPI, port: int = 0) -> Iterator[int]:
    """The app on a port, whose number this gives."""
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait = threading.Event().wait  # a test may have put something in the place of `time.sleep`
    while not server.started:
        wait(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


@pytest.fixture
def services(server: tuple[FastAPI, str], tmp_path: Path, migrated: Path) -> Services:
    """An empty database and store of the test's own, which the server serves from now on."""
    app, _ = server
    (tmp_path / "data").mkdir()
    shutil.copy(migrated, tmp_path / "data" / migrated.name)
    services = open_services(Settings(data_dir=tmp_path / "data", admin_key=ADMIN_KEY))
    app.state.services = services
    return services


@pytest.fixture
def url(server: tuple[FastAPI, str], services: Services) -> str:
    return server[1]


@pytest.fixture
def operator(url: str) -> Iterator[Client]:
    with Client(url, ADMIN_KEY) as client:
        yield client


@pytest.fixture
def alice(url: str, operator: Client, base: object) -> Iterator[Client]:
    """A tenant of a server that has a base."""
    with Client(url, operator.admin.create_tenant("alice")["key"]) as client:
        yield client


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `mixloom …` as whoever is logged in."""

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["mixloom", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main()
        said = capsys.readouterr()
        return Outcome(int(exit.value.code or 0), said.out, said.err)

    return run


@pytest.fixture
def as_alice(alice: Client, operator: Client, run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `mixloom …` as the tenant."""
    (tenant,) = operator.admin.tenants()
    monkeypatch.setenv("MIXLOOM_URL", alice.url)
    monkeypatch.setenv("MIXLOOM_API_KEY", operator.admin.create_key(tenant["id"])["key"])
    return run


@pytest.fixture
def as_operator(operator: Client, run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `mixloom …` with the admin key."""
    monkeypatch.setenv("MIXLOOM_URL", operator.url)
    monkeypatch.setenv("MIXLOOM_API_KEY", ADMIN_KEY)
    return run


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A stranger's CSV."""
    path = tmp_path / "data.csv"
    path.write_text("question;answer\n" + "".join(f"What is {n} and {n}?;{2 * n}\n" for n in range(20)))
    return path


COLUMNS = ("--column", "prompt=question", "--column", "completion=answer")


@pytest.fixture
def job_id(as_alice: Run, table: Path) -> str:
    """A job of the tenant's, submitted by command."""
    outcome = as_alice("submit", str(table), *COLUMNS, "--name", "sums", "--max-steps", "3")
    assert outcome.code == 0, outcome.err
    return outcome.out.strip()


@pytest.fixture
def finish(services: Services) -> Callable[[str], str]:
    """A function that ends a job as a daemon does, with an adapter of one small file. Gives its id."""

    def finish(job_id: str) -> str:
        adapter_id = new_id("adp")
        services.store.put(f"adapters/{adapter_id}", lambda folder: _write(folder / "README.md", "An adapter.\n"))
        with services.database.write() as session:
            job = session.get_one(Job, job_id)
            job.status, job.step, job.adapter_id = "succeeded", job.total_steps, adapter_id
            job.started_at = job.finished_at = time.time()
            session.add(
                Adapter(
                    id=adapter_id,
                    tenant_id=job.tenant_id,
                    name=job.name,
                    job_id=job.id,
                    step=job.total_steps,
                    final=True,
                    base_name=job.base_name,
                    base_hash=job.base_hash,
                    method=job.adapter["method"],
                    config=job.adapter,
                    valid_loss=None,
                    exact=True,
                    key=f"adapters/{adapter_id}",
                    sha256="0" * 64,
                    bytes=12,
                    created_at=time.time(),
                )
            )
        return adapter_id

    return finish


def _write(path: Path, text: str) -> None:
    path.write_text(text)
