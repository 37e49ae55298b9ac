"""What Prometheus reads from the policy server, in a registry of its own."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..decoding_openvla import NoActionError
from .batching import BatchQueue
from .policy import Answer, AnswerError

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counters of one server."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter("openvla_requests", "Requests by route and status.", ["route", "status"], **own)
        self.latency = Histogram("openvla_latency_seconds", "Arrival to answer.", buckets=SECONDS, **own)
        self.model = Histogram("openvla_model_seconds", "One pass of the model.", buckets=SECONDS, **own)
        self.rows = Histogram("openvla_batch_rows", "Requests in one pass.", buckets=(1, 2, 4, 8, 16, 32, 64), **own)
        self.again = Counter("openvla_answered_again", "Rows too close to call in a batch, answered alone.", **own)
        self.failed = Counter("openvla_model_failures", "Requests that the model could not answer.", **own)
        self.waiting = Gauge("openvla_waiting_requests", "Accepted and not yet answered.", **own)
        self.draining = Gauge("openvla_draining", "1 while the server is about to stop.", **own)

    def watch(self, queue: BatchQueue) -> None:
        """Read a queue whenever metrics are read."""
        self.waiting.set_function(lambda: len(queue))
        self.draining.set_function(lambda: float(queue.draining))

    def count(self, route: str, status: int | str) -> None:
        """One request is over."""
        self.requests.labels(route, str(status)).inc()

    def answered(self, answers: Sequence[Answer | AnswerError | NoActionError]) -> None:
        """One call of the model is over."""
        whole = [answer for answer in answers if isinstance(answer, Answer)]
        self.failed.inc(len(answers) - len(whole))
        self.again.inc(sum(answer.again for answer in whole))
        for answer in whole[:1]:
            self.rows.observe(len(answers))
            self.model.observe(answer.model_ms / 1000)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)
