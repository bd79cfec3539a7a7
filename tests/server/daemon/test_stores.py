"""A database and a data directory go together: in another one the files of its rows are not there."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import delete, select

from server.api.app import open_services
from server.api.services import Services
from server.daemon import main as daemon
from server.db.daemons import Fenced
from server.db.stores import MARK
from server.db.tables import Store
from server.errors import MixloomError
from server.settings import Settings
from tests.postgresql import PostgreSQL
from tests.server.conftest import Caller
from tests.server.daemon.conftest import PLAIN, Life, job, submit


def marks(services: Services) -> list[str]:
    with services.database.read() as session:
        return list(session.scalars(select(Store.id)))


@pytest.mark.databases("postgresql")
def test_who_has_another_data_directory_does_not_start(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "configure_logging", lambda settings: None)
    settings = services.settings.model_copy(update={"data_dir": services.settings.data_dir.with_name("other")})
    (mark,) = marks(services)
    for start in (open_services, lambda settings: daemon.main(settings, supervisor=None)):
        with pytest.raises(MixloomError, match=f"in another data directory than .*other.* {MARK} says {mark}"):
            start(settings)
    (settings.data_dir / MARK).write_text("store_of_another_database")
    with pytest.raises(MixloomError, match="in another data directory"):
        open_services(settings)
    (settings.data_dir / MARK).write_text(f"{mark}\n")  # as in a copy of it
    open_services(settings)
    open_services(services.settings)
    assert marks(services) == [mark]


def test_a_database_that_has_lost_its_newest_rows_is_known_again_by_its_data_directory(
    services: Services, alice: Caller
) -> None:
    before = marks(services)
    with services.database.write() as session:
        session.execute(delete(Store))
    open_services(services.settings)
    assert marks(services) == before == [(services.settings.data_dir / MARK).read_text().strip()]


def test_a_new_database_does_not_start_where_another_one_has_its_files(
    life: Life, alice: Caller, services: Services, postgresql: PostgreSQL
) -> None:
    """They would count as orphans, and be erased."""
    submit(alice, PLAIN, steps=2)
    life.finish()
    life.books.end()
    refuses(services.settings.model_copy(update={"database_url": postgresql.new_database()}))


@pytest.mark.databases("sqlite")
def test_who_has_lost_its_database_does_not_start_with_a_new_one(life: Life, alice: Caller, services: Services) -> None:
    submit(alice, PLAIN, steps=2)
    life.finish()
    life.books.end()
    for file in services.settings.data_dir.glob("mixloom.db*"):
        file.unlink()
    refuses(services.settings)


def refuses(settings: Settings) -> None:
    """Neither an API nor a daemon starts, and nothing is erased."""
    before = files(settings)
    assert any("adapters" in path.parts for path in before)
    for start in (open_services, lambda settings: daemon.main(settings, supervisor=None)):
        with pytest.raises(MixloomError, match=r"is new, and .* has the files of another one"):
            start(settings)
    assert files(settings) >= before


def files(settings: Settings) -> set[Path]:
    return {path for path in settings.data_dir.rglob("*") if path.is_file()}


def test_while_the_data_directory_is_not_there_no_job_fails_for_it(
    life: Life, new_life: Callable[..., Life], alice: Caller, services: Services
) -> None:
    """As when a shared folder is not mounted: an empty folder is in its place."""
    id_ = submit(alice, PLAIN, steps=3)
    folder = services.settings.data_dir
    files = [path for path in folder.iterdir() if not path.name.startswith("mixloom.db")]
    elsewhere = folder.with_name("elsewhere")
    elsewhere.mkdir()
    for path in files:
        path.rename(elsewhere / path.name)
    for _ in range(2):
        with pytest.raises(Fenced, match="the data directory cannot be read"):
            life.turn()
        assert job(services, id_).status in ("preparing", "queued")
        life = new_life()
    for path in files:
        if path.exists():  # what a start makes
            shutil.rmtree(path)
        (elsewhere / path.name).rename(path)
    life = new_life()
    life.finish()
    assert job(services, id_).status == "succeeded"
