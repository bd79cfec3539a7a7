"""On one PostgreSQL database everybody has one data directory: in another one the files of its rows are not there."""

import pytest
from sqlalchemy import delete, select

from server.api.app import open_services
from server.api.services import Services
from server.daemon import main as daemon
from server.db.stores import MARK
from server.db.tables import Store
from server.errors import MixloomError

pytestmark = pytest.mark.databases("postgresql")


def marks(services: Services) -> list[str]:
    with services.database.read() as session:
        return list(session.scalars(select(Store.id)))


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


def test_a_database_that_has_lost_its_newest_rows_is_known_again_by_its_data_directory(services: Services) -> None:
    before = marks(services)
    with services.database.write() as session:
        session.execute(delete(Store))
    open_services(services.settings)
    assert marks(services) == before == [(services.settings.data_dir / MARK).read_text().strip()]
