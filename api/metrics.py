"""Figures for Prometheus: this process's requests, and what the database holds at the moment of the scrape."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import Scope

__all__ = ["Metrics"]

SECONDS = (0.005, 0.02, 0.1, 0.5, 2, 10, 60)


class Metrics:
    """One registry for one application, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "tenfold_requests", "Requests answered", ["method", "route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "tenfold_request_seconds", "Time to answer", ["route"], buckets=SECONDS, registry=self.registry
        )
        self.jobs = Gauge("tenfold_jobs", "Jobs by state", ["state"], registry=self.registry)
        self.tasks = Gauge("tenfold_tasks", "Tasks by queue and state", ["queue", "state"], registry=self.registry)
        self.workers = Gauge("tenfold_workers", "Workers seen in the last minute", ["queue"], registry=self.registry)

    def observe(self, scope: Scope, status: int, seconds: float) -> None:
        """Count one request under its route's template: never under its path, which users choose."""
        route = str(getattr(scope.get("route"), "path", "none"))
        self.requests.labels(scope["method"], route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def render(
        self,
        jobs: Mapping[str, int],
        tasks: Mapping[tuple[str, str], int],
        workers: Mapping[str, int],
    ) -> bytes:
        """The text exposition; ``tasks`` is keyed by (queue, state), ``workers`` by queue."""
        for gauge in (self.jobs, self.tasks, self.workers):
            gauge.clear()
        for state, count in jobs.items():
            self.jobs.labels(state).set(count)
        for (queue, state), count in tasks.items():
            self.tasks.labels(queue, state).set(count)
        for queue, count in workers.items():
            self.workers.labels(queue).set(count)
        return generate_latest(self.registry)
