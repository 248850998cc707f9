"""Counts and times for `/metrics`, in Prometheus' format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

MILLISECONDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 30000)


class ServeMetrics:
    """One server's metrics; a registry of its own, so that several servers can live in one process."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self.requests = Counter(
            "hcx_serve_requests", "Calls by endpoint and status", ["endpoint", "status"], registry=registry
        )
        self.prompt_tokens = Counter("hcx_serve_prompt_tokens", "Prompt tokens accepted", registry=registry)
        self.completion_tokens = Counter("hcx_serve_completion_tokens", "Tokens generated", registry=registry)
        self.cancelled = Counter("hcx_serve_cancelled", "Choices dropped before their end", registry=registry)
        self.running = Gauge("hcx_serve_running", "Choices that hold a row of the cache", registry=registry)
        self.waiting = Gauge("hcx_serve_waiting", "Choices that wait for a row", registry=registry)
        self.ttft_ms = Histogram(
            "hcx_serve_ttft_ms", "Milliseconds to the first token", buckets=MILLISECONDS, registry=registry
        )
        self.token_ms = Histogram(
            "hcx_serve_token_ms", "Milliseconds between tokens", buckets=MILLISECONDS, registry=registry
        )

    def render(self) -> bytes:
        """The text of `/metrics`."""
        return generate_latest(self._registry)
