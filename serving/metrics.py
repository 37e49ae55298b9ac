"""Prometheus metrics of the policy server, in a registry of their own."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..inference.batches import Prediction
from .batching import BatchQueue
from .policy import Outcome, PreparedRequest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Metrics of one server.

    Args:
        queue: The queue whose length is reported.
    """

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, queue: BatchQueue[PreparedRequest, Prediction]) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self._requests = Counter(
            "openvla_requests", "Requests by route and status.", ["route", "status"], registry=registry
        )
        self._latency = Histogram(
            "openvla_latency_seconds", "From arrival to result.", buckets=SECONDS, registry=registry
        )
        self._model_time = Histogram("openvla_model_seconds", "One forward pass.", buckets=SECONDS, registry=registry)
        self._batch_size = Histogram(
            "openvla_batch_rows", "Requests in one forward pass.", buckets=BATCH_SIZES, registry=registry
        )
        self._recomputed = Counter(
            "openvla_recomputed",
            "Requests predicted again alone, since a token of the batch led by less than rounding.",
            registry=registry,
        )
        self._failures = Counter("openvla_model_failures", "Requests that got no action.", registry=registry)
        waiting = Gauge("openvla_waiting_requests", "Accepted requests without a reply.", registry=registry)
        waiting.set_function(lambda: len(queue))
        draining = Gauge("openvla_draining", "1 while the server is draining.", registry=registry)
        draining.set_function(lambda: float(queue.draining))

    def count_request(self, route: str, status: int | str) -> None:
        """Count a finished request."""
        self._requests.labels(route, str(status)).inc()

    def observe_latency(self, seconds: float) -> None:
        """Record the time from a request's arrival to its result."""
        self._latency.observe(seconds)

    def observe_batch(self, outcomes: Sequence[Outcome]) -> None:
        """Record the outcomes of one batch."""
        predictions = [outcome for outcome in outcomes if isinstance(outcome, Prediction)]
        self._failures.inc(len(outcomes) - len(predictions))
        self._recomputed.inc(sum(prediction.recomputed for prediction in predictions))
        if predictions:
            self._batch_size.observe(len(outcomes))
            self._model_time.observe(predictions[0].model_ms / 1000)

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self._registry)
