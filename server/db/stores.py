"""Which data directory has the files that the tables name. With another one nobody starts: its files would count as
erasable, and those that the tables name as lost.
"""

from pathlib import Path

from sqlalchemy import select

from server.db.session import Database, one_at_a_time
from server.db.tables import Store, Tenant
from server.errors import MixloomError
from server.ids import new_id
from server.orphans import PREFIXES
from server.settings import Settings
from server.store import LocalStore

MARK = "store.id"
"""A file of the data directory, with the id of the one row of `stores`."""


def refuse_other_store(settings: Settings, database: Database) -> None:
    """The first start makes a database and a data directory each other's.

    Raises `other_data_dir`: they are not; or the database is new, and the data directory has another one's files.
    """
    folder = settings.data_dir
    with database.write() as session:
        one_at_a_time(session, "stores")
        known = session.scalar(select(Store.id))
        if known is None:
            if session.scalar(select(Tenant.id).limit(1)) is None and _has_files(folder):
                raise _other(
                    f"The database {database.name} is new, and {folder} has the files of another one, which a server "
                    f"would erase. Name the database that it had, or with --data-dir a folder that is empty."
                )
            known = _read(folder) or _write(folder)
            session.add(Store(id=known))
    if _read(folder) != known:
        raise _other(
            f"The files of the database {database.name} are in another data directory than {folder}: in the one whose "
            f"{MARK} says {known}. Name that one with --data-dir; on another machine it is a shared folder."
        )


def is_there(folder: Path) -> bool:
    """Whether it still is the data directory that it was at the start, and no empty folder in its place."""
    return (folder / MARK).is_file()


def _has_files(folder: Path) -> bool:
    store = LocalStore(folder)
    return any(store.children(prefix) for prefix in PREFIXES)


def _read(folder: Path) -> str | None:
    mark = folder / MARK
    return mark.read_text().strip() if mark.exists() else None


def _write(folder: Path) -> str:
    id_ = new_id("store")
    draft = folder / f"{MARK}.tmp"
    draft.write_text(f"{id_}\n")
    LocalStore(folder).publish_file(draft, MARK)
    return id_


def _other(message: str) -> MixloomError:
    return MixloomError("other_data_dir", message, 500, "data_dir")
