"""The transport and the API, counted on their way."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aggregator.telemetry.metrics import CHANNELS, OTHER, ServiceMetrics
from aggregator.transport import Connected, Delivery, Inbound, Transport

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


@dataclass
class MeteredTransport:
    """Passes everything on, and counts it."""

    inner: Transport
    metrics: ServiceMetrics
    _began: float | None = None
    _received: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Looks labels up once."""
        m = self.metrics
        self._received = {
            channel: (m.received.labels(channel), m.received_bytes.labels(channel))
            for channel in (*CHANNELS, OTHER)
        }
        self._taken, self._refused = m.published.labels("taken"), m.published.labels("refused")

    def receive(self, limit: int, timeout: float) -> list[Inbound]:
        """See `Transport`; what lies between two calls is one turn of the main loop."""
        if self._began is not None:
            self.metrics.turn.observe(time.monotonic() - self._began)
        batch = self.inner.receive(limit, timeout)
        self._began = time.monotonic() if batch else None
        for item in batch:
            if isinstance(item, Delivery):
                count, size = self._received.get(item.topic.rpartition("/")[2]) or self._received[OTHER]
                count.inc()
                size.inc(len(item.payload))
            elif isinstance(item, Connected):
                self.metrics.connections.inc()
        return batch

    def acknowledge(self, delivery: Delivery) -> None:
        """See `Transport`."""
        self.inner.acknowledge(delivery)
        if delivery.arrived:
            self.metrics.delivery.observe(time.monotonic() - delivery.arrived)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """See `Transport`."""
        taken = self.inner.publish(topic, payload, retain=retain)
        if taken:
            self._taken.inc()
            self.metrics.published_bytes.inc(len(payload))
        else:
            self._refused.inc()
        return taken

    def busy(self) -> bool:
        """See `Transport`."""
        return self.inner.busy()

    def reset(self) -> None:
        """See `Transport`."""
        self.inner.reset()


class MeteredApi:
    """Measures every request, by its route and not by its path: a path may hold anything."""

    def __init__(self, app: ASGIApp, metrics: ServiceMetrics) -> None:
        """Wraps an application."""
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            # A stream lasts as long as somebody listens: that is no time of a request.
            if not route.endswith("/events"):
                method = scope["method"] if scope["method"] in _METHODS else OTHER
                self._metrics.requests.labels(method, route, str(status)).observe(time.monotonic() - began)
