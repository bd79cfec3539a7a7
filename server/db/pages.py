"""Keyset pages: a list goes on after the object that the caller saw last. Knows no HTTP."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from server.errors import MixloomError

MAX_DIGITS = 18  # what a 64-bit column can hold


@dataclass(frozen=True, kw_only=True)
class Page:
    """Which part of a list is asked for. `after` is the id of the last object seen, in the order given."""

    limit: int = 20
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None


def fetch_page(
    session: Session,
    scope: Select[Any],
    page: Page,
    *,
    identity: InstrumentedAttribute[Any],
    order: Sequence[InstrumentedAttribute[Any]],
    filters: Sequence[Any] = (),
) -> tuple[list[Any], bool]:
    """(objects, whether more follow) of a page of `scope`, filtered.

    `scope` is what the caller may see at all: a cursor is looked up in it without the filters, so that a page
    goes on even if the object it ended with no longer passes them. `order` must be unique: end it with the
    id. Raises 400 `unknown_cursor`.
    """
    statement = scope.where(*filters)
    if page.after is not None:
        seen = session.scalar(scope.where(identity == _typed(identity, page.after)))
        if seen is None:
            raise _unknown_cursor(page.after)
        place = tuple_(*(getattr(seen, column.key) for column in order))
        here = tuple_(*order)
        statement = statement.where(here > place if page.order == "asc" else here < place)
    statement = statement.order_by(*(column.asc() if page.order == "asc" else column.desc() for column in order))
    found = list(session.scalars(statement.limit(page.limit + 1)))
    return found[: page.limit], len(found) > page.limit


def _typed(identity: InstrumentedAttribute[Any], after: str) -> Any:
    if identity.type.python_type is not int:
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
