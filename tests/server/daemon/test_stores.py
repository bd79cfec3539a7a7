"""A database and a data directory go together: in another one the files of its rows are not there."""

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import delete, select

from server.api.app import open_services
from server.api.services import Services
from server.backup import back_up
from server.daemon import main as daemon
from server.daemon.points import Place
from server.db.daemons import Fenced
from server.db.migrate import upgrade_tables
from server.db.session import Database
from server.db.stores import MARK, refuse_other_store
from server.db.tables import Store, Tenant
from server.errors import MixloomError
from server.settings import Settings
from tests.postgresql import PostgreSQL
from tests.server.conftest import Caller
from tests.server.daemon.conftest import PLAIN, Life, job, points, submit


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


@pytest.mark.databases("postgresql")
def test_a_start_that_is_refused_writes_no_key(services: Services) -> None:
    other = services.settings.data_dir.with_name("other")
    with pytest.raises(MixloomError, match="in another data directory"):
        open_services(services.settings.model_copy(update={"data_dir": other, "admin_key": None}))
    assert not (other / "admin.key").exists()


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


def test_a_server_that_has_a_base_and_no_tenant_yet_is_no_new_one(life: Life, services: Services) -> None:
    """As one of an older version, which had no mark."""
    with services.database.write() as session:
        session.execute(delete(Store))
        session.execute(delete(Tenant))
    (services.settings.data_dir / MARK).unlink()
    assert files(services.settings)
    open_services(services.settings)
    assert marks(services) == [(services.settings.data_dir / MARK).read_text().strip()]


@pytest.mark.databases("postgresql")
def test_an_upgraded_server_does_not_start_where_none_of_its_files_are(
    life: Life, alice: Caller, services: Services, tmp_path: Path
) -> None:
    submit(alice, PLAIN, steps=2)
    life.finish()
    with services.database.write() as session:
        session.execute(delete(Store))
    for name, of_another in (("empty", False), ("of-another", True)):
        folder = tmp_path / name
        folder.mkdir()
        if of_another:
            (folder / MARK).write_text("store_of_another")
            (folder / "adapters" / "adp_of_another").mkdir(parents=True)
        with pytest.raises(MixloomError, match="None of the files of the database"):
            open_services(services.settings.model_copy(update={"data_dir": folder}))
    open_services(services.settings)
    assert marks(services) == [(services.settings.data_dir / MARK).read_text().strip()]


def test_who_starts_first_at_the_same_moment_has_one_mark(services: Services) -> None:
    together = threading.Barrier(4)

    def start() -> None:
        together.wait(30)
        refuse_other_store(services.settings, Database(services.settings.database))

    for _ in range(5):
        with services.database.write() as session:
            session.execute(delete(Store))
        (services.settings.data_dir / MARK).unlink()
        with ThreadPoolExecutor(4) as pool:
            for started in [pool.submit(start) for _ in range(4)]:
                started.result()
        assert marks(services) == [(services.settings.data_dir / MARK).read_text().strip()]


def test_a_new_database_takes_no_mark_that_lies_about(
    services: Services, postgresql: PostgreSQL, tmp_path: Path
) -> None:
    (tmp_path / MARK).write_text("store_of_another")
    settings = Settings(data_dir=tmp_path, database_url=postgresql.new_database())
    open_services(settings)
    assert "another" not in (tmp_path / MARK).read_text()


@pytest.mark.databases("sqlite")
def test_a_start_that_is_refused_costs_no_backup(life: Life, alice: Caller, services: Services, tmp_path: Path) -> None:
    submit(alice, PLAIN, steps=2)
    life.finish()
    life.books.end()
    settings, target = services.settings, tmp_path / "backup"
    assert back_up(settings, target).findings == []
    before = sorted(path for path in target.rglob("*") if path.is_file())
    for file in settings.data_dir.glob("mixloom.db*"):
        file.unlink()
    refuses(settings)
    assert not (settings.data_dir / "mixloom.db").exists()
    upgrade_tables(Database(settings.database))  # whatever else makes an empty one
    with pytest.raises(MixloomError, match="is new, and"):
        back_up(settings, target)
    assert sorted(path for path in target.rglob("*") if path.is_file()) == before


def test_a_backup_of_another_server_is_not_overwritten(services: Services, tmp_path: Path) -> None:
    target = tmp_path / "backup"
    back_up(services.settings, target)
    (target / MARK).write_text("store_of_another")
    with pytest.raises(MixloomError, match="is a backup of another server"):
        back_up(services.settings, target)


def test_a_file_that_only_one_job_has_cannot_be_read_and_only_that_job_fails(
    life: Life, alice: Caller, bob: Caller, services: Services
) -> None:
    """It is a folder, say."""
    broken, good = submit(alice, PLAIN, steps=2), submit(bob, PLAIN, steps=2)
    file = services.store.path(job(services, broken).tokens_key) / "train.safetensors"
    file.unlink()
    file.mkdir()
    life.finish()
    assert [job(services, id_).status for id_ in (broken, good)] == ["failed", "succeeded"]


def test_what_was_written_while_the_data_directory_was_not_there_is_not_named(
    life: Life, new_life: Callable[..., Life], alice: Caller, services: Services
) -> None:
    """A recovery point in the empty folder that was in its place would have taken the place of a real one."""
    id_ = submit(alice, PLAIN)
    life.turn_until(lambda: job(services, id_).step == 5)
    life.writer.wait()
    kept = [point.key for point in points(services, id_)]
    mark = services.settings.data_dir / MARK
    away = mark.with_name("away")
    mark.rename(away)
    resident = life.resident(id_)
    with pytest.raises(Fenced, match="is not there"):
        life.turn()
    life.roster.points.save(
        resident.job, resident.run, Place(resident.run_id, resident.program.cursor, 0), lambda: None
    )
    with pytest.raises(Fenced, match="is not there"):
        life.writer.wait()
    assert [point.key for point in points(services, id_)] == kept
    away.rename(mark)
    new_life().finish()
    assert job(services, id_).status == "succeeded"


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
        with pytest.raises(Fenced, match="the data directory is not there"):
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
