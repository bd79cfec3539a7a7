"""Which data directory has the files that the tables name. With another one nobody starts: its files would count as
erasable, and those that the tables name as lost.
"""

from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from server.db.session import Database, one_at_a_time
from server.db.tables import Adapter, Base, Job, Store, Tenant
from server.errors import MixloomError
from server.ids import new_id
from server.orphans import PREFIXES
from server.settings import Settings
from server.store import LocalStore

MARK = "store.id"
"""A file of the data directory, with the id of the one row of `stores`."""
_OF_NO_NEW_ONE = (select(Tenant.id).limit(1), select(Base.hash).limit(1))
_NAMED = (select(Base.folder_key), select(Adapter.key).limit(100), select(Job.tokens_key).limit(100))
"""Some folders that are named."""


def refuse_new_database(settings: Settings) -> None:
    """Before SQLite's file would be made. Raises `other_data_dir`: it is gone, and its files are there."""
    path = Database(settings.database).path
    if path is not None and not (path.exists() and path.stat().st_size) and _has_files(settings.data_dir):
        raise _is_new(path.name, settings.data_dir)


def refuse_other_store(settings: Settings, database: Database) -> None:
    """The first start makes a database and a data directory each other's.

    Raises `other_data_dir`: they are not; or the database is new, and the data directory has another one's files.
    `data_dir_not_writable`.
    """
    if check_store(settings, database):
        return
    with database.write() as session:
        one_at_a_time(session, "stores")
        if session.scalar(select(Store.id)) is None:
            session.add(Store(id=_mark(settings.data_dir, is_new=_is_empty(session))))
    check_store(settings, database)  # of two first starts the other one may have been faster


def read_mark(folder: Path) -> str | None:
    """Of a data directory; None: it has none, or it is not there."""
    try:
        return (folder / MARK).read_text().strip()
    except OSError:
        return None


def check_store(settings: Settings, database: Database) -> bool:
    """Whether they are known to be each other's; False: nobody has said so yet, and they may be.

    Raises `other_data_dir`, as above.
    """
    folder = settings.data_dir
    has_files = _has_files(folder)
    with database.read() as session:
        known = session.scalar(select(Store.id))
        is_empty = _is_empty(session)
        named = [] if known else [key for statement in _NAMED for key in session.scalars(statement)]
    if known is not None and read_mark(folder) != known:  # after the row, which another first start writes after it
        raise _other(
            f"The files of the database {database.name} are in another data directory than {folder}: in the one whose "
            f"{MARK} says {known}. Name that one with --data-dir; on another machine it is a shared folder."
        )
    if known is None and is_empty and has_files:
        raise _is_new(database.name, folder)
    if named and not any((folder / key).exists() for key in named):
        raise _other(
            f"None of the files of the database {database.name} is in {folder}. Name the data directory that has them "
            "with --data-dir; on another machine it is a shared folder."
        )
    return known is not None


def _is_empty(session: Session) -> bool:
    return all(session.scalar(statement) is None for statement in _OF_NO_NEW_ONE)


def _has_files(folder: Path) -> bool:
    store = LocalStore(folder)
    return any(store.children(prefix) for prefix in PREFIXES)


def _mark(folder: Path, *, is_new: bool) -> str:
    """What a data directory says, or is made to say; of a new database nothing that lies about is taken.

    Raises `data_dir_not_writable`.
    """
    if not is_new and (known := read_mark(folder)) is not None:
        return known
    id_ = new_id("store")
    try:
        draft = folder / f"{MARK}.{id_}.tmp"
        draft.write_text(f"{id_}\n")
        LocalStore(folder).publish_file(draft, MARK)
    except OSError as error:
        raise MixloomError(
            "data_dir_not_writable",
            f"{folder / MARK} cannot be written ({error.strerror}). Mend that, and start again.",
            500,
        ) from error
    return id_


def _is_new(name: str, folder: Path) -> MixloomError:
    return _other(
        f"The database {name} is new, and {folder} has the files of another one, which a server would erase. Name the "
        "database that it had, restore that, or name with --data-dir a folder that is empty."
    )


def _other(message: str) -> MixloomError:
    return MixloomError("other_data_dir", message, 500, "data_dir")
