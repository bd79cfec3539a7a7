"""Lists of the API: the page parameters, the filter by metadata, and the one shape of every list."""

from typing import Annotated, Any, Literal

from fastapi import Depends, Query, Request

from server.db.pages import Page


async def _page(
    limit: Annotated[int, Query(ge=1, le=100, description="Most objects in the answer.")] = 20,
    order: Annotated[Literal["asc", "desc"], Query(description="By time of creation.")] = "desc",
    after: Annotated[str | None, Query(description="The `last_id` of the page before.")] = None,
) -> Page:
    return Page(limit=limit, order=order, after=after)


PageDep = Annotated[Page, Depends(_page)]


async def _metadata(request: Request) -> dict[str, str]:
    """`metadata[team]=blue&…` as a dict."""
    return {
        name.removeprefix("metadata[").removesuffix("]"): value
        for name, value in request.query_params.items()
        if name.startswith("metadata[") and name.endswith("]")
    }


MetadataDep = Annotated[dict[str, str], Depends(_metadata)]
METADATA_PARAMETER = {
    "parameters": [
        {
            "name": "metadata",
            "in": "query",
            "style": "deepObject",
            "explode": True,
            "schema": {"type": "object", "additionalProperties": {"type": "string"}},
        }
    ]
}
"""Goes into the `openapi_extra` of a route that takes `MetadataDep`."""


def list_answer(data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """The answer of a list route; every object in `data` has an `id`."""
    return {
        "object": "list",
        "data": data,
        "has_more": has_more,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }
