"""Waiting for operations without holding threads: one query for all who wait, however many they are."""

import asyncio

from starlette.concurrency import run_in_threadpool

from server.db import operations
from server.db.daemons import is_any_live
from server.db.session import Database
from server.db.tables import Operation
from server.errors import MixloomError

POLL_SECONDS = 0.02


def no_daemon() -> MixloomError:
    """503: there is nobody to compute."""
    return MixloomError(
        "no_daemon",
        "No engine daemon is running to generate anything. Try again when GET /readyz says ready.",
        503,
        headers={"Retry-After": "5"},
    )


class OperationWatch:
    """Asks the database for every waiting request at once, as long as one waits."""

    def __init__(self, database: Database):
        self._database = database
        self._waiting: dict[str, asyncio.Future[Operation]] = {}
        self._polling: asyncio.Task[None] | None = None

    async def wait(self, operation_id: str) -> Operation:
        """The operation once it is done or failed. Raises 503 `no_daemon` when the daemon is gone."""
        future = asyncio.get_running_loop().create_future()
        self._waiting[operation_id] = future
        if self._polling is None or self._polling.done():
            self._polling = asyncio.create_task(self._poll())
        try:
            return await future
        finally:
            self._waiting.pop(operation_id, None)

    async def _poll(self) -> None:
        try:
            while self._waiting:
                ended, alive = await run_in_threadpool(self._look, list(self._waiting))
                for operation in ended:
                    self._settle(operation.id, operation)
                if not alive:
                    for operation_id in list(self._waiting):
                        self._settle(operation_id, no_daemon())
                await asyncio.sleep(POLL_SECONDS)
        except Exception as error:
            for operation_id in list(self._waiting):
                self._settle(operation_id, error)

    def _look(self, ids: list[str]) -> tuple[list[Operation], bool]:
        with self._database.read() as session:
            return operations.find_ended(session, ids), is_any_live(session)

    def _settle(self, operation_id: str, outcome: Operation | Exception) -> None:
        future = self._waiting.pop(operation_id, None)
        if future is None or future.done():
            return
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
