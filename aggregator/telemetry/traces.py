"""Traces by OpenTelemetry: a span for each round that has ended, with one for each of its phases.

They are made from the round's report, with its own times, so that nothing on the way of a message waits for
them. Off unless OTEL_EXPORTER_OTLP_ENDPOINT (or its variant for traces) names a collector, and covey[otel] is
installed.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from aggregator.records import Round
from aggregator.repository import Repository, RepositoryError
from aggregator.rounds.report import RoundReport

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

logger = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


class RoundTraces:
    """Tells a tracer of rounds; takes what an `EventFeed` takes."""

    def __init__(self, repository: Repository, provider: TracerProvider) -> None:
        """Prepares it; the provider's owner shuts it down."""
        self._repository = repository
        self._tracer = provider.get_tracer("covey.aggregator", version("covey"))

    def publish(self, kind: str, data: Mapping[str, Any]) -> None:
        """Makes the spans of a round that has ended; of anything else, nothing."""
        if kind != "round" or data["status"] == "running":
            return
        try:
            with self._repository.read() as reader:
                ended = reader.round(data["round"])
        except RepositoryError as error:
            logger.warning("a round that ended is not traced: %s", error)
            return
        if ended is not None and ended.ended_at is not None:
            self._trace(ended, ended.ended_at)

    def _trace(self, ended: Round, at: float) -> None:
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        span = self._tracer.start_span(
            "round",
            start_time=_nanoseconds(ended.started_at),
            attributes={
                "covey.round": ended.round_id,
                "covey.campaign": ended.campaign_id,
                "covey.number": ended.number,
                "covey.model": ended.model or "",
                "covey.invited": len(ended.invited),
                "covey.status": ended.status,
            },
        )
        if ended.status != "completed":
            span.set_status(Status(StatusCode.ERROR, ended.code))
        inside = set_span_in_context(span)
        for phase in RoundReport.from_bytes(ended.report).phases:
            child = self._tracer.start_span(
                phase.phase,
                inside,
                start_time=_nanoseconds(phase.started),
                attributes={"covey.expected": phase.expected, "covey.answered": phase.answered},
            )
            child.end(_nanoseconds(at if phase.ended is None else phase.ended))
        span.end(_nanoseconds(at))


@contextlib.contextmanager
def tracing(repository: Repository) -> Iterator[tuple[RoundTraces, ...]]:
    """The listener that traces rounds, or none; what waits to be sent is sent at the end."""
    if not any(os.environ.get(name) for name in ENDPOINTS):
        yield ()
        return
    if find_spec("opentelemetry") is None or find_spec("opentelemetry.exporter") is None:
        logger.warning("a collector of traces is named, but OpenTelemetry is missing: install covey[otel]")
        yield ()
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win.
    provider = TracerProvider(resource=Resource.create() if _named() else Resource.create(_NAME))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    try:
        yield (RoundTraces(repository, provider),)
    finally:
        provider.shutdown()


_NAME = {"service.name": "covey-aggregator"}


def _named() -> bool:
    return "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
