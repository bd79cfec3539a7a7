"""Every row of one database into another, whichever kinds the two are.

What a server that was only started has written, the mark of its data directory, counts for nothing there.
"""

from sqlalchemy import Connection, delete, func, insert, inspect, literal, select
from sqlalchemy import Table as SqlTable
from sqlalchemy.exc import DataError, IntegrityError

from server.db.migrate import reaching
from server.db.session import Database
from server.db.tables import Store, Table
from server.errors import MixloomError

BATCH_ROWS = 1000
"""In memory at once."""


def need_empty(database: Database) -> None:
    """Of any version, or without tables. Raises `database_not_empty`, `database_unreachable`."""
    with reaching(database), database.look() as connection:
        _need_empty(database, connection)


def copy_rows(original: Database, copy: Database) -> None:
    """All rows as they are at one moment, in one transaction. Both have this version's tables, `copy` without rows.

    Raises `database_not_empty`, or `rows_refused`: SQLite takes what PostgreSQL does not, such as a row whose parent is
    not there.
    """
    with copy.write() as session:
        writer = session.connection()
        _need_empty(copy, writer)
        writer.execute(delete(Store))
        with original.look() as reader:  # which ends before a commit that may take long: PostgreSQL would end it
            for table in Table.metadata.sorted_tables:  # whoever is referred to before who refers
                _copy_table(table, reader, writer)
        if copy.path is None:
            _go_on_counting(writer)


def _copy_table(table: SqlTable, reader: Connection, writer: Connection) -> None:
    found = reader.execution_options(yield_per=BATCH_ROWS).execute(select(table))
    try:
        for batch in found.mappings().partitions():
            writer.execute(insert(table), [dict(row) for row in batch])
    except (IntegrityError, DataError) as error:
        raise MixloomError(
            "rows_refused", f"A row of {table.name} is not taken: {str(error.orig).strip()}. Mend it where it is.", 400
        ) from error


def _need_empty(database: Database, connection: Connection) -> None:
    there = inspect(connection).get_table_names()
    for table in Table.metadata.sorted_tables:
        if table.name not in there or table.name == Store.__tablename__:
            continue
        if connection.execute(select(literal(1)).select_from(table).limit(1)).first() is not None:
            message = f"The database {database.name} has rows already ({table.name}). Name an empty one."
            raise MixloomError("database_not_empty", message, 400, "database_url")


def _go_on_counting(connection: Connection) -> None:
    """PostgreSQL numbers new rows by counters, which rows that bring their number leave where they are."""
    for table in Table.metadata.sorted_tables:
        if (number := table.autoincrement_column) is not None:
            counter = func.pg_get_serial_sequence(table.name, number.name)
            connection.execute(select(func.setval(counter, func.coalesce(func.max(number), 0) + 1, False)))
