"""Rows as one parameter, joined like a table: an UPDATE of many rows is one statement, to which there is one answer."""

from typing import Any

from sqlalchemy import JSON, ColumnElement, Float, Subquery, bindparam, cast, column, select
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeEngine


class _Elements(FunctionElement[Any]):
    """The elements of an array in JSON, each a row of one column `value`."""

    inherit_cache = True


def given(name: str, **columns: type[TypeEngine[Any]]) -> Subquery:
    """The rows in the parameter of that name: dictionaries of these columns."""
    elements = _Elements(bindparam(name, type_=JSON)).table_valued(column("value", JSON))
    return select(*(_value(elements.c.value[key], type_).label(key) for key, type_ in columns.items())).subquery()


def _value(member: Any, type_: type[TypeEngine[Any]]) -> ColumnElement[Any]:
    """A float is never a string, of which SQLite writes 15 digits; an integer may be of 64 bits."""
    return member.as_float() if type_ is Float else cast(member.as_string(), type_)


@compiles(_Elements, "postgresql")
def _postgresql(element: _Elements, compiler: Any, **options: Any) -> str:
    return f"json_array_elements({compiler.process(element.clauses, **options)})"


@compiles(_Elements, "sqlite")
def _sqlite(element: _Elements, compiler: Any, **options: Any) -> str:
    return f"json_each({compiler.process(element.clauses, **options)})"
