"""Metrics of a server, in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
PICTURES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The counters of one process that answers requests.

    Args:
        queue: returns model -> its requests that wait or are drawn now.
    """

    def __init__(self, queue: Callable[[], Mapping[str, int]]) -> None:
        self._queue = queue
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "ddpm_serve_requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        self._seconds = Histogram(
            "ddpm_serve_request_seconds", "Time to answer.", ["path"], buckets=SECONDS, registry=registry
        )
        self._images = Counter("ddpm_serve_images", "Pictures that were answered.", ["model"], registry=registry)
        self._batches = Histogram(
            "ddpm_serve_batch_images", "Pictures of a network batch.", ["model"], buckets=PICTURES, registry=registry
        )
        self._waits = Histogram(
            "ddpm_serve_batch_wait_seconds",
            "Time that the first request of a network batch waited.",
            ["model"],
            buckets=(0.001, 0.0025, 0.005, *SECONDS),
            registry=registry,
        )
        self._waiting = Gauge("ddpm_serve_queue", "Requests that wait or are drawn.", ["model"], registry=registry)
        self._retries = Counter(
            "ddpm_serve_retries", "Requests asked again because a replica died.", ["model"], registry=registry
        )

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def drawn(self, model: str, images: int, batches: list[Mapping[str, Any]]) -> None:
        """Count pictures, and the batches in which they were drawn, each by its first request."""
        self._images.labels(model).inc(images)
        for batch in batches:
            if batch["first"]:
                self._batches.labels(model).observe(batch["pictures"])
                self._waits.labels(model).observe(batch["waited_s"])

    def retried(self, model: str) -> None:
        """Count a request that is asked again."""
        self._retries.labels(model).inc()

    def text(self) -> bytes:
        """Return all of it."""
        for model, waiting in self._queue().items():
            self._waiting.labels(model).set(waiting)
        return generate_latest(self._registry)
