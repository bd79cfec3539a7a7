"""Two versions on one database: an older one that starts is refused in a sentence, and one at work goes on."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from server import serve
from server.__main__ import main
from server.api.services import Services
from server.daemon import main as daemon
from tests.server.conftest import Caller
from tests.server.daemon.conftest import PLAIN, Life, job, submit

COMMANDS = ("serve", "api", "daemon", "db upgrade", "doctor", "backup COPY")


@pytest.fixture
def upgrade(services: Services) -> Iterator[Callable[[], None]]:
    """Brings the database to the next version, which adds what no statement of this one names; then back."""

    def execute(*statements: str) -> None:
        with services.database.write() as session:
            for statement in statements:
                session.execute(text(statement))

    with services.database.read() as session:
        known = session.scalar(text("SELECT version_num FROM alembic_version"))
    yield lambda: execute("ALTER TABLE jobs ADD COLUMN later TEXT", "UPDATE alembic_version SET version_num = '9999'")
    execute("ALTER TABLE jobs DROP COLUMN later", f"UPDATE alembic_version SET version_num = '{known}'")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_an_older_version_says_that_the_database_is_newer(
    command: str,
    services: Services,
    upgrade: Callable[[], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module in (serve, daemon):
        monkeypatch.setattr(module, "configure_logging", lambda settings: None)
    upgrade()
    url, copy = services.settings.database_url, tmp_path / "copy"
    flags = ["--data-dir", str(services.settings.data_dir), *(["--database-url", url] if url else [])]
    arguments = command.replace("COPY", str(copy)).split()
    assert main([*arguments, *flags, *(["--port", "0"] if command in ("serve", "api") else [])]) == 1
    said = capsys.readouterr()
    assert "was written by a newer version (its revision is 9999" in said.err
    assert (said.err.count("\n"), said.out) == (1, "")
    assert not copy.exists()


def test_what_is_at_work_goes_on_when_a_newer_version_has_been_there(
    life: Life, alice: Caller, services: Services, upgrade: Callable[[], None]
) -> None:
    training = submit(alice, PLAIN)
    life.turn_until(lambda: bool(life.roster.residents) and life.step_of(training) == 3)
    upgrade()
    late = submit(alice, PLAIN, steps=2)
    life.finish()
    assert [job(services, id_).status for id_ in (training, late)] == ["succeeded"] * 2
    assert alice.get(f"/jobs/{late}").json()["status"] == "succeeded"
