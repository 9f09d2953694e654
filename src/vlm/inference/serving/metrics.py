"""What `/metrics` tells Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server."""

    def __init__(self):
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter("vlm_requests", "Requests by path and status", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "vlm_request_seconds",
            "Seconds from a request's headers to the end of its answer",
            ["path"],
            buckets=SECONDS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            "vlm_first_token_seconds",
            "Seconds from a request's body to the first piece of its answer",
            buckets=SECONDS,
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "vlm_prompt_tokens", "Tokens of prompts, those of images included", registry=registry
        )
        self.answer_tokens = Counter("vlm_answer_tokens", "Tokens of answers", registry=registry)
        self.clients_left = Counter("vlm_clients_left", "Requests whose client left before the end", registry=registry)

    def add_gauge(self, name: str, purpose: str, read: Callable[[], float]) -> None:
        """Add a number that is read whenever it is wanted."""
        Gauge(name, purpose, registry=self.registry).set_function(read)

    def render(self) -> bytes:
        """Return all numbers in Prometheus' text format."""
        return generate_latest(self.registry)
