"""Which data directory has the files that the tables name: whoever works on a PostgreSQL database has the same."""

from sqlalchemy import select

from server.db.session import Database, one_at_a_time
from server.db.tables import Store
from server.errors import MixloomError
from server.ids import new_id
from server.settings import Settings
from server.store import LocalStore

MARK = "store.id"
"""A file of the data directory, with the id of the one row of `stores`."""


def refuse_other_store(settings: Settings, database: Database) -> None:
    """The first start on a database makes its data directory the one for all.

    SQLite's file lies in it, and needs no mark. Raises `other_data_dir`.
    """
    if database.path is not None:
        return
    mark = settings.data_dir / MARK
    with database.write() as session:
        one_at_a_time(session, "stores")
        known = session.scalar(select(Store.id))
        if known is None:
            known = mark.read_text().strip() if mark.exists() else _mark(settings)
            session.add(Store(id=known))
    if not mark.exists() or mark.read_text().strip() != known:
        raise MixloomError(
            "other_data_dir",
            f"The files of the database {database.name} are in another data directory than {settings.data_dir}: in the "
            f"one whose {MARK} says {known}. Name that one with --data-dir; on another machine it is a shared folder.",
            500,
            "data_dir",
        )


def _mark(settings: Settings) -> str:
    id_ = new_id("store")
    draft = settings.data_dir / f"{MARK}.tmp"
    draft.write_text(f"{id_}\n")
    LocalStore(settings.data_dir).publish_file(draft, MARK)
    return id_
