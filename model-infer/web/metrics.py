"""Collects the service's metrics, in Prometheus' text format."""

from contextlib import suppress
from functools import partial
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from pictures.outcome import UNLIKE

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)  # seconds


class Metrics:
    """The metrics of one service."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory and CPU time of the process that answers requests, from /proc
        gauge, counter = partial(Gauge, registry=self.registry), partial(Counter, registry=self.registry)
        self.memory = gauge("mnist_memory_bytes", "Memory of all processes; what they share is counted once.")
        self.requests = counter("mnist_requests", "Requests by route and HTTP status.", ["route", "status"])
        self.duration = Histogram(
            "mnist_request_duration_seconds",
            "Time from a request's headers to the end of its response.",
            ["route"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.in_progress = gauge("mnist_requests_in_progress", "Requests in progress.")
        outcomes = f"Predictions by outcome: sure, unsure, {UNLIKE}, refused."
        self.predictions = counter("mnist_predictions", outcomes, ["outcome"])
        accuracy = "Accuracy of the model on the test images, 0 to 1; NaN if it has not been evaluated."
        self.accuracy = gauge("mnist_model_accuracy_ratio", accuracy)
        self.model = gauge("mnist_model_info", "Always 1; the label is the sha256 of the model.", ["sha256"])

    def count(self, route: str, status: int, seconds: float) -> None:
        """Count a request and its duration."""
        self.requests.labels(route, str(status)).inc()
        self.duration.labels(route).observe(seconds)

    def set_model(self, sha256: str | None, accuracy: float | None) -> None:
        """Set the sha256 and the accuracy, in percent, of the served model; None if there is none."""
        self.model.clear()
        if sha256:
            self.model.labels(sha256).set(1)
        self.accuracy.set(float("nan") if accuracy is None else accuracy / 100)


def memory_of(process: int) -> int:
    """Return the bytes of memory of a process, with its part of what it shares with others; 0 if it has ended."""
    with suppress(OSError):
        return 1024 * int(Path(f"/proc/{process}/smaps_rollup").read_text().partition("Pss:")[2].split()[0])
    return 0
