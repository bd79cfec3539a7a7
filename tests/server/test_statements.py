"""What a request costs the database: how many statements each of the routes that are asked all the time runs."""

from collections.abc import Iterator

import pytest
from sqlalchemy import event

from server.api.services import Services
from server.db.tables import Base
from tests.server.conftest import Caller
from tests.server.making import add_adapter, add_metric, change_job, submit

MOST = {
    "/me": 4,
    "/jobs": 5,
    "/jobs/ID": 5,
    "/jobs/ID/events": 3,
    "/jobs/ID/metrics": 3,
    "/jobs/ID/checkpoints": 3,
}


@pytest.fixture
def statements(services: Services) -> Iterator[list[str]]:
    """Those that were executed."""
    seen: list[str] = []

    def see(_connection: object, _cursor: object, statement: str, *_others: object) -> None:
        seen.append(statement)

    event.listen(services.database.engine, "before_cursor_execute", see)
    yield seen
    event.remove(services.database.engine, "before_cursor_execute", see)


@pytest.mark.parametrize("route", MOST)
def test_a_request_runs_no_more_statements_however_many_jobs_there_are(
    route: str, alice: Caller, base: Base, services: Services, statements: list[str]
) -> None:
    jobs = [submit(alice)["id"] for _ in range(3)]
    change_job(services, jobs[0], adapter_id=add_adapter(services, jobs[0], 1, valid_loss=1.0))
    add_metric(services, jobs[0], 1)
    statements.clear()
    answer = alice.get(route.replace("ID", jobs[0]))
    assert answer.status_code == 200
    asked = [statement for statement in statements if not statement.startswith("BEGIN")]
    assert 0 < len(asked) <= MOST[route], "\n".join(asked)
