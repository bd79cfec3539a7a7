"""The log: one line an event, text on a terminal and JSON elsewhere. Never row texts, prompts or keys.

A logger's message is a machine word ("request"); what belongs to it is given as `extra={"fields": {…}}`.
"""

import json
import logging
import sys
import time
import traceback
from typing import IO, Any

from server.settings import Settings


class _Formatter(logging.Formatter):
    def _values(self, record: logging.LogRecord) -> dict[str, Any]:
        values = {name: value for name, value in getattr(record, "fields", {}).items() if value is not None}
        if record.exc_info and record.exc_info[1] is not None:
            values["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        return values


class JsonFormatter(_Formatter):
    """`{"time", "level", "logger", "event", …fields}`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        head = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        return json.dumps({**head, **self._values(record)}, default=str)


class TextFormatter(_Formatter):
    """`12:00:00 info request method=GET …`; a traceback follows in lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, but for a traceback."""
        values = self._values(record)
        trace = values.pop("traceback", "")
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        words = [
            clock,
            record.levelname.lower(),
            record.getMessage(),
            *(f"{k}={v}" for k, v in values.items()),
        ]
        return " ".join(words) + (f"\n{trace.rstrip()}" if trace else "")


def configure_logging(settings: Settings, stream: IO[str] | None = None) -> None:
    """Send every logger of the process to `stream` (standard error), in the format of the settings."""
    stream = sys.stderr if stream is None else stream
    is_text = settings.log_format == "text" or (settings.log_format == "auto" and stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter() if is_text else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    for name in ("alembic", "uvicorn.access"):  # each request has its line already
        logging.getLogger(name).setLevel(logging.WARNING)
