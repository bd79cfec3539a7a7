"""Keyset pages: a list goes on after the object that the caller saw last. Knows no HTTP."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal

from sqlalchemy import Select, bindparam, tuple_
from sqlalchemy.orm import InstrumentedAttribute

from server.db.session import Entity, Reader, read_only, rows
from server.errors import MixloomError

MAX_DIGITS = 18  # what a 64-bit column can hold


@dataclass(frozen=True, kw_only=True)
class Page:
    """Which part of a list is asked for. `after` is the id of the last object seen, in the order given."""

    limit: int = 20
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None


class Listing(Generic[Entity]):
    """What a caller may page through. Its statements are built once."""

    def __init__(
        self,
        scope: Select[Entity],
        *,
        identity: InstrumentedAttribute[Any],
        order: Sequence[InstrumentedAttribute[Any]],
    ):
        """`scope` is what the caller may see at all. `order` must be unique: end it with the id."""
        self._holds_int = identity.type.python_type is int
        self._seen = scope.with_only_columns(*order).where(identity == bindparam("after"))
        place = tuple_(*(bindparam(f"after_{index}", type_=column.type) for index, column in enumerate(order)))
        beyond = {"asc": tuple_(*order) > place, "desc": tuple_(*order) < place}
        first = {
            "asc": scope.order_by(*(column.asc() for column in order)).limit(bindparam("limit")),
            "desc": scope.order_by(*(column.desc() for column in order)).limit(bindparam("limit")),
        }
        self._first = first
        self._next = {name: first[name].where(beyond[name]) for name in first}

    def page(
        self, reader: Reader, page: Page, values: Mapping[str, Any] | None = None, filters: Sequence[Any] = ()
    ) -> tuple[list[Entity], bool]:
        """(objects, whether more follow) of a page, filtered. `values` are the scope's own.

        A cursor is looked up in the scope without the filters, so that a page goes on even if the object it ended
        with no longer passes them. Raises 400 `unknown_cursor`.
        """
        values = {**(values or {}), "limit": page.limit + 1}
        statement = self._first[page.order]
        if page.after is not None:
            seen = rows(reader, self._seen, {**values, "after": self._typed(page.after)})
            if not seen:
                raise _unknown_cursor(page.after)
            values |= {f"after_{index}": value for index, value in enumerate(seen[0])}
            statement = self._next[page.order]
        if filters:
            statement = statement.where(*filters)
        found = list(read_only(reader, statement, values))
        return found[: page.limit], len(found) > page.limit

    def _typed(self, after: str) -> Any:
        if not self._holds_int:
            return after
        if not after.isdecimal() or len(after) > MAX_DIGITS:
            raise _unknown_cursor(after)
        return int(after)


def _unknown_cursor(after: str) -> MixloomError:
    return MixloomError(
        "unknown_cursor",
        f"'after' names '{after}', which is not in this list. Start again without it, or use a `last_id`.",
        400,
        "after",
    )
