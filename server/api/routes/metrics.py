"""Figures for Prometheus, read at each scrape. They tell of all tenants together, so they are the operator's."""

from collections.abc import Iterable
from typing import Any

from fastapi import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from server.api.deps import AdminDep, ServicesDep
from server.api.routing import new_router
from server.db import jobs, operations
from server.db.daemons import live_daemons
from server.states import JobStatus

router = new_router(tag="health")


class _Figures(Collector):
    """What was read for one scrape."""

    def __init__(self, families: Iterable[Metric]):
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


@router.get("/metrics")
def scrape(admin: AdminDep, services: ServicesDep) -> Response:
    """Jobs by status, waiting operations and the daemon's speed, in Prometheus' text format."""
    with services.database.read() as session:
        num_jobs = jobs.count_by_status(session)
        num_waiting = operations.count_waiting(session)
        details = [daemon.detail for daemon in live_daemons(session)]
    by_status = GaugeMetricFamily("mixloom_jobs", "Jobs of all tenants.", labels=["status"])
    for status in JobStatus:
        by_status.add_metric([status.value], num_jobs.get(status, 0))
    families = [
        by_status,
        _gauge("mixloom_operations_waiting", "Requests to /generate that have no answer yet.", num_waiting),
        _gauge("mixloom_daemon_up", "Engine daemons that were heard from lately.", len(details)),
        _gauge("mixloom_resident_runs", "Runs in the daemons' memory.", _sum(details, "resident_runs")),
        _gauge(
            "mixloom_tokens_per_second", "Speed over the last minute of training.", _sum(details, "tokens_per_second")
        ),
        CounterMetricFamily(
            "mixloom_engine_seconds", "Time in passes and optimizer steps.", value=_sum(details, "engine_seconds")
        ),
    ]
    registry = CollectorRegistry()
    registry.register(_Figures(families))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def _sum(details: Iterable[dict[str, Any]], name: str) -> float:
    return sum(detail.get(name, 0) for detail in details)


def _gauge(name: str, help_: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help_, value=value)
