"""Rows as one parameter, read like a table: a change of many rows is one statement, to which there is one answer."""

from typing import Any

from sqlalchemy import JSON, ColumnElement, Subquery, bindparam, cast, column, literal_column, select
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeEngine


class _Elements(FunctionElement[Any]):
    """The elements of an array in JSON, each a row of one column `value`."""

    inherit_cache = True


class _Member(FunctionElement[Any]):
    """What an object in JSON has under a key, which is part of the text; in SQLite a number is a number."""

    inherit_cache = True


def given(name: str, **columns: type[TypeEngine[Any]]) -> Subquery:
    """The rows in the parameter of that name: dictionaries of these columns."""
    elements = _Elements(bindparam(name, type_=JSON)).table_valued(column("value", JSON))
    return select(*(_value(elements.c.value, key, type_).label(key) for key, type_ in columns.items())).subquery()


def _value(row: Any, key: str, type_: type[TypeEngine[Any]]) -> ColumnElement[Any]:
    return row[key] if type_ is JSON else cast(_Member(row, literal_column(f"'{key}'")), type_)


@compiles(_Elements, "postgresql")
def _postgresql(element: _Elements, compiler: Any, **options: Any) -> str:
    return f"json_array_elements({compiler.process(element.clauses, **options)})"


@compiles(_Elements, "sqlite")
def _sqlite(element: _Elements, compiler: Any, **options: Any) -> str:
    return f"json_each({compiler.process(element.clauses, **options)})"


@compiles(_Member, "postgresql")
def _member_in_postgresql(element: _Member, compiler: Any, **options: Any) -> str:
    row, key = (compiler.process(clause, **options) for clause in element.clauses)
    return f"({row} ->> {key})"


@compiles(_Member, "sqlite")
def _member_in_sqlite(element: _Member, compiler: Any, **options: Any) -> str:
    row, key = (compiler.process(clause, **options) for clause in element.clauses)
    return f"json_extract({row}, '$.' || {key})"
