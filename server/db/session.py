"""Connections to SQLite or PostgreSQL: reads that see one moment, writes that commit all or nothing."""

import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, Executable, Select, bindparam, create_engine, event, func, select
from sqlalchemy.exc import DBAPIError, InternalError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as NoConnectionFree
from sqlalchemy.orm import Session
from sqlalchemy.pool import PoolProxiedConnection

from server.errors import MixloomError

BUSY_SECONDS = 30
"""For a lock, or for one of a process's connections, nobody waits longer."""
LOCKED_SECONDS = 0.001
"""So long who wants SQLite's write lock sleeps before it asks again. SQLite itself would sleep for up to 0.1 s."""
IDLE_SECONDS = 5
"""PostgreSQL ends a transaction whose owner says nothing for so long: a process that was stopped holds no lock."""
SILENT_SECONDS = 60
"""A PostgreSQL that says nothing for so long in the middle of a statement is given up: it has said before of a lock."""
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_UNREADABLE = frozenset({sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_SHORT_READ})
_DAMAGED_WORDS = ("unsupported file format", "Could not decode to UTF-8")
"""What SQLite has no code of its own for: a header, and a text, that are not as they were written."""
_DAMAGED_STATES = frozenset({"XX001", "XX002", "58030", "58P01"})
"""PostgreSQL: data, or an index, are corrupted; the disk does not give a file, or has none."""
_PASS_ALONE = select(func.pg_advisory_xact_lock(func.hashtext(bindparam("noun"))))

Entity = TypeVar("Entity")
Reader = Session | Connection
"""What a statement on columns is run by."""


class Database:
    """The tables behind a URL. The statements in this folder are the same for both kinds of database.

    SQLite lets one write at a time. On PostgreSQL writes run side by side (READ COMMITTED): what a statement decides
    by, it has locked before, the row with `with_for_update` or a whole noun with `one_at_a_time`.
    """

    def __init__(self, url: URL, *, is_patient: bool = False, many_read: bool = False):
        """`is_patient`: a statement may take as long as it takes, and wait as long for a lock.

        `many_read`: threads that read at once are many. A read of SQLite is processor time alone, and Python's lock
        changes hands at each statement: ten threads in the middle of a read wait for each other ten times over. So the
        many read one after the other.
        """
        self.url = url
        self._is_postgresql = url.get_backend_name() == "postgresql"
        self._turn = RLock() if many_read and not self._is_postgresql else nullcontext()
        if self._is_postgresql:
            self.engine = _postgresql(url, is_patient)
            self._reading: Engine = self.engine.execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )
            self._glancing: Engine = self.engine.execution_options(isolation_level="AUTOCOMMIT")
            self._writing: Engine = self.engine
            self._version = "SELECT pg_current_snapshot()::text"
        else:
            self.engine = self._reading = self._glancing = _sqlite(url, _begin)
            self._writing = _sqlite(url, _begin_writing)
            self._version = "PRAGMA data_version"
        self._watching: Connection | None = None

    @property
    def name(self) -> str:
        """For people: without a password."""
        return self.url.render_as_string(hide_password=True) if self.path is None else str(self.path)

    @property
    def path(self) -> Path | None:
        """SQLite's file."""
        return None if self._is_postgresql else Path(str(self.url.database))

    def close(self) -> None:
        """Close every connection; the next statement opens one again."""
        if self._watching is not None:
            self._watching.close()
            self._watching = None
        self._reading.dispose()
        self._writing.dispose()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session for reading; nothing in it is written. What was read stays readable after it."""
        with self.look() as connection, Session(connection, expire_on_commit=False, autoflush=False) as session:
            yield session

    @contextmanager
    def look(self) -> Iterator[Connection]:
        """As `read`, for statements on columns: a session, which keeps entities, takes longer than a statement.

        It ends with a COMMIT: when psycopg sees a ROLLBACK, it lets go of every statement that it has prepared.
        """
        with self._turn, self._reading.begin() as connection:
            yield connection

    @contextmanager
    def glance(self) -> Iterator[Connection]:
        """For a single statement on columns: that is a moment of its own, without a transaction around it."""
        with self._turn, self._glancing.connect() as connection:
            yield connection

    def version(self) -> object:
        """Another value than before when anybody has written since. It is for one thread, and cheap.

        SQLite counts others' writes for each connection; on PostgreSQL who sees the same snapshot sees the same rows.
        """
        if self._watching is None:
            self._watching = self._glancing.connect()
        with self._watching.begin():
            return self._watching.exec_driver_sql(self._version).scalar_one()

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session that commits at the end of the block."""
        with Session(self._writing, expire_on_commit=False) as session:
            yield session
            session.commit()


def rows(reader: Reader, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Sequence[Any]:
    """What a statement on columns finds, past the ORM, which would take as long again. It flushes nothing before."""
    connection = reader.connection() if isinstance(reader, Session) else reader
    return connection.execute(statement, parameters).all()


def read_only(
    reader: Reader, statement: Select[Entity], parameters: Mapping[str, Any] | None = None
) -> Sequence[Entity]:
    """As `rows`, of a statement on one entity: each has the entity's columns, and nothing else of it."""
    return rows(reader, statement, parameters)


def is_outage(error: SQLAlchemyError) -> bool:
    """Whether the database could not be reached, or broke off what was under way: the same may work later."""
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    return isinstance(error, OperationalError | InternalError | NoConnectionFree)


def is_damaged(error: DBAPIError) -> bool:
    """Whether the database says that its files are not as they were written, or the disk that it does not give them."""
    code = getattr(error.orig, "sqlite_errorcode", 0)
    return (
        code & 0xFF in _DAMAGED  # the other bits say where
        or code in _UNREADABLE
        or str(error.orig).startswith(_DAMAGED_WORDS)
        or getattr(error.orig, "sqlstate", None) in _DAMAGED_STATES
    )


def is_in_doubt(error: BaseException) -> bool:
    """Whether nobody knows if what was being written is there: the connection broke, perhaps behind the commit."""
    return isinstance(error, DBAPIError) and error.connection_invalidated


def one_at_a_time(session: Session, noun: str) -> None:
    """Until this transaction ends, no other that says the same passes here. Every write to SQLite is so anyway."""
    connection = session.connection()
    if connection.dialect.name == "postgresql":
        connection.execute(_PASS_ALONE, {"noun": noun})


def _postgresql(url: URL, is_patient: bool) -> Engine:
    try:
        from server.db import postgresql

        return postgresql.create(
            url,
            lock_seconds=None if is_patient else BUSY_SECONDS,
            idle_seconds=IDLE_SECONDS,
            silent_seconds=None if is_patient else SILENT_SECONDS,
        )
    except ModuleNotFoundError as error:
        raise MixloomError(
            "postgres_not_installed",
            f"database_url names PostgreSQL, and {error.name} is not installed: pip install 'mixloom[postgres]'.",
            500,
            "database_url",
        ) from None


def _sqlite(url: URL, begin: Callable[[PoolProxiedConnection], None]) -> Engine:
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS}, pool_timeout=BUSY_SECONDS, hide_parameters=True)
    event.listen(engine, "connect", _configure_sqlite)
    # In the place of a listener to "begin", with which SQLAlchemy goes a longer way through every statement.
    engine.dialect.do_begin = begin  # type: ignore[assignment, method-assign]
    return engine


def _begin(connection: PoolProxiedConnection) -> None:
    connection.cursor().execute("BEGIN")


def _begin_writing(connection: PoolProxiedConnection) -> None:
    """Take the one write lock at once: no upgrade of a lock, no deadlock."""
    cursor, began = connection.cursor(), time.monotonic()
    cursor.execute("PRAGMA busy_timeout=0")
    while True:
        try:
            cursor.execute("BEGIN IMMEDIATE")
            break
        except sqlite3.OperationalError as error:
            is_locked = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY  # the rest says what it is busy with
            if not is_locked or time.monotonic() - began > BUSY_SECONDS:
                raise
        time.sleep(LOCKED_SECONDS)


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # BEGIN is ours, above
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"busy_timeout={BUSY_SECONDS * 1000}",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
