"""The log: one line an event, JSON off a terminal."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from server.logs import configure_logging
from server.settings import Settings


@pytest.fixture(autouse=True)
def _root_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def logged(**settings: str) -> str:
    stream = io.StringIO()
    configure_logging(Settings(**settings), stream)  # type: ignore[arg-type]
    log = logging.getLogger("server.test")
    log.info("request", extra={"fields": {"path": "/jobs", "tenant_id": None}})
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        log.error("internal_error", exc_info=error)
    return stream.getvalue()


def test_off_a_terminal_each_event_is_one_line_of_json() -> None:
    first, second = map(json.loads, logged().splitlines())
    assert (first["level"], first["logger"], first["event"], first["path"]) == (
        "info",
        "server.test",
        "request",
        "/jobs",
    )
    assert "tenant_id" not in first
    assert "ValueError: two\nlines" in second["traceback"]


def test_text_is_for_people() -> None:
    lines = logged(log_format="text").splitlines()
    assert lines[0].endswith("info request path=/jobs")
    assert lines[-2:] == ["ValueError: two", "lines"]


def test_the_level_is_the_settings() -> None:
    assert [json.loads(line)["event"] for line in logged(log_level="error").splitlines()] == ["internal_error"]
