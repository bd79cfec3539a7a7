"""Connections: short reads, and writes that take SQLite's one write lock at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, event, text
from sqlalchemy.orm import Session

BUSY_SECONDS = 30


class Database:
    """One SQLite file in WAL mode. `read()` sees one snapshot; `write()` commits all or nothing."""

    def __init__(self, path: Path):
        self.path = path
        self.engine = create_engine(
            f"sqlite:///{path}",
            connect_args={"timeout": BUSY_SECONDS},
            hide_parameters=True,  # an error's text goes into the log, and the values are a tenant's
        )
        event.listen(self.engine, "connect", _configure)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session for reading; nothing in it is written. What was read stays readable after it."""
        with Session(self.engine, expire_on_commit=False) as session:
            session.execute(text("BEGIN"))
            yield session  # closing rolls back, and does not expire what was read

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session that commits at the end of the block. BEGIN IMMEDIATE: no lock upgrade, no deadlock."""
        with Session(self.engine, expire_on_commit=False) as session:
            session.execute(text("BEGIN IMMEDIATE"))
            yield session
            session.commit()


def _configure(connection: Any, _record: Any) -> None:
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
