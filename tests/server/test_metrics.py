"""What Prometheus is told. A job's own metrics are in test_progress."""

import time
from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.api.services import Services
from server.db import operations
from server.db.tables import Base
from tests.server.conftest import Caller
from tests.server.making import change_job, submit


def figures(admin: Caller) -> dict[tuple[str, ...], float]:
    """Each sample's value by its name and labels, as Prometheus itself reads them."""
    answer = admin.get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(answer.text)
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


def test_a_scrape_counts_jobs_and_waiting_requests_and_shows_the_daemons_speed(
    admin: Caller, alice: Caller, bob: Caller, services: Services, publish_base: Callable[..., Base]
) -> None:
    base = publish_base(detail={"tokens_per_second": 123.5, "resident_runs": 2, "engine_seconds": 4.5})
    for caller in (alice, bob, alice):
        job = submit(caller)["id"]
    change_job(services, job, status="running")
    with services.database.write() as session:
        for id_ in ("op_1", "op_2"):
            operations.add_sample(
                session,
                id_=id_,
                tenant_id=alice.tenant_id,
                adapter_id=None,
                base_hash=base.hash,
                key=f"operations/{id_}",
                deadline=time.time() + 600,
            )
        operations.give_up(session, "op_2", {"category": "user", "code": "gone", "message": "Nobody waits."})
    assert figures(admin) == {
        ("mixloom_jobs", "queued"): 2,
        ("mixloom_jobs", "preparing"): 0,
        ("mixloom_jobs", "running"): 1,
        ("mixloom_jobs", "paused"): 0,
        ("mixloom_jobs", "succeeded"): 0,
        ("mixloom_jobs", "failed"): 0,
        ("mixloom_jobs", "cancelled"): 0,
        ("mixloom_operations_waiting",): 1,
        ("mixloom_daemon_up",): 1,
        ("mixloom_resident_runs",): 2,
        ("mixloom_tokens_per_second",): 123.5,
        ("mixloom_engine_seconds_total",): 4.5,
    }


@pytest.mark.parametrize("has_been_there", [False, True])
def test_a_daemon_that_is_gone_is_down_and_has_no_speed(
    has_been_there: bool, admin: Caller, publish_base: Callable[..., Base]
) -> None:
    if has_been_there:
        publish_base(live=False, detail={"tokens_per_second": 123.5, "resident_runs": 2})
    found = figures(admin)
    names = ("mixloom_daemon_up", "mixloom_resident_runs", "mixloom_tokens_per_second")
    assert [found[name,] for name in names] == [0, 0, 0]


def test_a_scrape_needs_the_admin_key(alice: Caller, anonymous: Caller) -> None:
    assert alice.get("/metrics").json()["error"]["code"] == "admin_key_required"
    assert anonymous.get("/metrics").json()["error"]["code"] == "invalid_api_key"
