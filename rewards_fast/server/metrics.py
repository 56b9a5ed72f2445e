"""What Prometheus is told."""

from __future__ import annotations

from typing import Any

import prometheus_client

from rewards_fast.pvcp import REASONS
from rewards_fast.server.limits import Load

OPEN_PATHS = ("/healthz", "/readyz")  # answered without a token
PATHS = ("/v1/score", "/get_reward", *OPEN_PATHS, "/metrics", "/docs", "/openapi.json")


class Metrics:
    """Prometheus counters of one application, in a registry of their own."""

    def __init__(self, load: Load) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=self.registry)
        prometheus_client.GCCollector(registry=self.registry)
        options: dict[str, Any] = {"namespace": "rewards_fast", "registry": self.registry}
        buckets = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
        self.requests = prometheus_client.Counter("requests", "Answers", ["path", "status"], **options)
        self.seconds = prometheus_client.Histogram(
            "request_seconds", "From the headers to the last byte of the "
                "answer", ["path"], buckets=buckets, **options
        )  # fmt: skip
        self.stage = prometheus_client.Counter(
            "stage_seconds", "Time of the worker threads", ["stage"], **options
        )
        self.texts = prometheus_client.Counter(
            "texts", "Scored texts, by why they do not parse", ["reason"], **options
        )
        self.missing = prometheus_client.Counter(
            "missing_targets", "Scored texts without a target composition", **options
        )
        waiting = prometheus_client.Gauge("queue_requests", "Requests read and not yet answered", **options)
        waiting.set_function(lambda: load.requests)
        held = prometheus_client.Gauge("held_bytes", "Bodies that are being read or scored", **options)
        held.set_function(lambda: load.held)
        self.reasons = {reason: self.texts.labels(reason or "parses") for reason in (None, *REASONS)}
        self.decode, self.score, self.encode = (
            self.stage.labels(name) for name in ("decode", "score", "encode")
        )
        self.answered: dict[tuple[str, int], Any] = {}
        self.timed = {path: self.seconds.labels(path) for path in (*PATHS, "other")}

    def answer(self, path: str, status: int, seconds: float) -> None:
        """Counts an answer."""
        key = path, status
        if key not in self.answered:
            self.answered[key] = self.requests.labels(path, str(status))
        self.answered[key].inc()
        self.timed[path].observe(seconds)

    def scored(self, reasons: list[str | None], missing: list[bool]) -> None:
        """Counts texts by reason, and those without a target."""
        self.missing.inc(sum(missing))
        for reason in set(reasons):
            self.reasons[reason].inc(reasons.count(reason))
