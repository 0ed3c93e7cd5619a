"""What the service tells of itself to Prometheus: how long each stage takes, what waits, what caches save."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Seconds. A search takes milliseconds, an upload of a large picture seconds.
BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """The measures of one service, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._stages = Histogram(
            "searchengine_stage_seconds",
            "Time that a stage of an answer took: queue, decode, encode, search, rows.",
            ["stage"],
            buckets=BUCKETS,
            registry=registry,
        )
        self._requests = Histogram(
            "searchengine_request_seconds",
            "Time until the last byte of an answer was handed to the network.",
            ["method", "route", "status"],
            buckets=BUCKETS,
            registry=registry,
        )
        self._lookups = Counter(
            "searchengine_cache_lookups", "Lookups in a cache.", ["cache", "found"], registry=registry
        )
        self.batch_texts = Histogram(
            "searchengine_batch_texts",
            "Texts in one call of the encoder.",
            buckets=(1, 2, 4, 8, 16),
            registry=registry,
        )
        self.refused = Counter("searchengine_overloads", "Requests refused because too many waited.", registry=registry)
        self.photos = Gauge("searchengine_index_photos", "Photos in the index.", registry=registry)
        self.vectors = Gauge("searchengine_index_vectors", "Vectors that are searched.", registry=registry)
        self.segments = Gauge("searchengine_index_segments", "Files of vectors.", registry=registry)

    def watch(self, name: str, about: str, value: Callable[[], float]) -> None:
        """A gauge whose value is looked up when somebody asks."""
        Gauge(name, about, registry=self.registry).set_function(value)

    def observe(self, stage: str, seconds: float) -> None:
        self._stages.labels(stage).observe(seconds)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.observe(stage, time.perf_counter() - started)

    def count_lookups(self, cache: str, *, hits: int, misses: int) -> None:
        self._lookups.labels(cache, "yes").inc(hits)
        self._lookups.labels(cache, "no").inc(misses)

    def observe_request(self, method: str, route: str, status: int, seconds: float) -> None:
        self._requests.labels(method, route, str(status)).observe(seconds)

    def text(self) -> bytes:
        """All of them, in Prometheus's text format."""
        return generate_latest(self.registry)


class Measured:
    """ASGI middleware: each request by its method, the template of its route and its status."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            # Only what this program calls a route or a method, so that nobody can fill its memory with names.
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST") else "other"
            self._metrics.observe_request(method, route, status, time.perf_counter() - started)
