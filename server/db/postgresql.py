"""Connections to PostgreSQL that end: where nothing arrives any more, and nobody says that it is over."""

import select
import time
from typing import Any

import psycopg
from psycopg.abc import PQGen
from psycopg.rows import TupleRow
from sqlalchemy import URL, Engine, create_engine, event

QUIET_SECONDS = 1.0


def create(url: URL, *, lock_seconds: float | None, idle_seconds: float, silent_seconds: float | None) -> Engine:
    """An engine. PostgreSQL itself ends waits for a lock, and transactions whose owner says nothing.

    A network that loses all packets is noticed by TCP. Who only keeps quiet (a server that is stopped, or whose disk
    hangs; something between that swallows data) is given up after `silent_seconds`. Of both, None: never.
    """
    settings = {
        "idle_in_transaction_session_timeout": f"{idle_seconds}s",
        "lock_timeout": f"{lock_seconds or 0}s",
        "plan_cache_mode": "force_generic_plan",  # to plan the snapshot anew takes longer than to carry it out
    }
    engine = create_engine(
        url,
        hide_parameters=True,  # an error's text goes into the log, and the values are a tenant's
        pool_pre_ping=True,  # a restart of the database breaks no later request: see `Connection.is_quiet`
        pool_timeout=lock_seconds,
        connect_args={
            "connect_timeout": 10,
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 20_000,
            "options": " ".join(f"-c {name}={value}" for name, value in settings.items()),
        },
    )

    ask = engine.dialect.do_ping

    def do_ping(dbapi_connection: Any) -> bool:
        return dbapi_connection.is_quiet or ask(dbapi_connection)

    engine.dialect.do_ping = do_ping  # type: ignore[method-assign]

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: Any, _record: Any, arguments: Any, options: Any) -> Connection:
        connection = Connection.connect(*arguments, **options)
        connection.silent_seconds = silent_seconds
        return connection

    return engine


class Connection(psycopg.Connection[TupleRow]):
    """One that closes itself when it has waited for `silent_seconds` and nothing came."""

    silent_seconds: float | None = None
    _heard = 0.0

    @property
    def is_quiet(self) -> bool:
        """Whether it was heard just now, and nothing came since: a server that ends would have said so.

        That spares a question, and the wait for its answer, before each of many transactions.
        """
        if time.monotonic() - self._heard > QUIET_SECONDS:
            return False
        news = select.poll()
        news.register(self.fileno(), select.POLLIN)
        return not news.poll(0)

    def wait(self, gen: PQGen[Any], *arguments: Any, **options: Any) -> Any:
        """Raises `OperationalError`, as for a connection that is lost."""
        return super().wait(self._listen(gen), *arguments, **options)

    def _listen(self, gen: PQGen[Any]) -> PQGen[Any]:
        """`gen`, a dialogue with the server: it yields what it waits for and is sent what is there, or nothing."""
        self._heard = time.monotonic()
        try:
            waits_for = next(gen)
            while True:
                is_there = yield waits_for
                if is_there:
                    self._heard = time.monotonic()
                elif self.silent_seconds is not None and time.monotonic() - self._heard > self.silent_seconds:
                    self.close()
                    raise psycopg.OperationalError(f"the server has said nothing for {self.silent_seconds} seconds")
                waits_for = gen.send(is_there)
        except StopIteration as end:
            return end.value
