"""What the service counts, for Prometheus.

Counters come from what was committed and from what passed the transport; gauges are read when somebody looks.
Labels have few values: phases, channels, statuses, names of models, routes. Never a device or a round, of
which there is no end; logs have those.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, Info, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from aggregator.records import Round
from aggregator.repository import Repository, RepositoryError
from aggregator.rounds.report import PHASES, RoundReport

logger = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
CHANNELS = ("status", "msg", "chunk")
OTHER = "other"
_QUICK = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SLOW = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_VERSIONS_BEHIND = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 100)
_MOST_CODES = 32


class ServiceMetrics:
    """The metrics of one service; any thread may count."""

    def __init__(self, repository: Repository) -> None:
        """Begins at zero.

        Args:
            repository: where gauges are read from, and rounds that have ended.
        """
        self._repository = repository
        self._codes: set[str] = set()
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        Info("covey_build", "Which Covey runs.", registry=registry).info({"version": version("covey")})
        self.received = Counter(
            "covey_messages_received", "Messages of devices.", ["channel"], registry=registry
        )
        self.received_bytes = Counter(
            "covey_received_bytes", "Bytes of those messages.", ["channel"], registry=registry
        )
        self.published = Counter(
            "covey_messages_published", "Messages handed to the broker.", ["outcome"], registry=registry
        )
        self.published_bytes = Counter(
            "covey_published_bytes", "Bytes of those that it took.", registry=registry
        )
        self.delivery = Histogram(
            "covey_delivery_seconds",
            "From a message's arrival until it is durably accounted for.",
            registry=registry,
            buckets=_QUICK,
        )
        self.turn = Histogram(
            "covey_loop_turn_seconds",
            "How long the main loop works on one batch.",
            registry=registry,
            buckets=_QUICK,
        )
        self.connections = Counter(
            "covey_broker_connections", "Connections to the broker that came up.", registry=registry
        )
        self._rounds_started = Counter(
            "covey_rounds_started", "Rounds that began.", ["model"], registry=registry
        )
        self._rounds_ended = Counter(
            "covey_rounds_ended", "Rounds that ended.", ["model", "status", "code"], registry=registry
        )
        self._round = Histogram(
            "covey_round_seconds", "Length of rounds.", ["status"], registry=registry, buckets=_SLOW
        )
        self._phase = Histogram(
            "covey_phase_seconds", "Length of phases.", ["phase"], registry=registry, buckets=_SLOW
        )
        self._expected = Counter(
            "covey_phase_expected", "Answers that devices owed in a phase.", ["phase"], registry=registry
        )
        self._answered = Counter(
            "covey_phase_answered", "Answers that came in time.", ["phase"], registry=registry
        )
        self._staleness = Histogram(
            "covey_update_staleness",
            "How many versions behind the updates in the sums of buffered campaigns were.",
            ["model"],
            registry=registry,
            buckets=_VERSIONS_BEHIND,
        )
        self._too_old = Counter(
            "covey_updates_too_old",
            "Updates of buffered campaigns that were dropped for being too far behind.",
            ["model"],
            registry=registry,
        )
        self._versions = Counter(
            "covey_versions_published",
            "Versions of models that were published.",
            ["model"],
            registry=registry,
        )
        self._presence = Counter(
            "covey_device_changes", "Devices that came, went, were enrolled.", ["change"], registry=registry
        )
        self.requests = Histogram(
            "covey_http_request_seconds",
            "Requests to the API.",
            ["method", "route", "status"],
            registry=registry,
            buckets=_QUICK,
        )
        for channel in (*CHANNELS, OTHER):
            self.received.labels(channel), self.received_bytes.labels(channel)
        for outcome in ("taken", "refused"):
            self.published.labels(outcome)
        for phase in PHASES:
            self._phase.labels(phase), self._expected.labels(phase), self._answered.labels(phase)

    def collect_with(self, collect: Callable[[], Iterator[Metric]]) -> None:
        """Adds metrics that are made when somebody looks."""
        self.registry.register(_OnDemand(collect))

    def text(self) -> bytes:
        """Everything, in the text format that Prometheus reads."""
        return generate_latest(self.registry)

    def publish(self, kind: str, data: Mapping[str, Any]) -> None:
        """Counts what a committed transaction changed; takes what an `EventFeed` takes."""
        if kind == "device":
            self._presence.labels(data["change"]).inc()
        elif kind == "version":
            self._versions.labels(data["model"]).inc()
        elif kind == "round" and "number" in data:
            self._rounds_started.labels(data["model"] or "").inc()
        elif kind == "round" and data["status"] != "running":
            try:
                with self._repository.read() as reader:
                    ended = reader.round(data["round"])
            except RepositoryError as error:
                logger.warning("a round that ended is not counted: %s", error)
                return
            if ended is not None:
                self._count(ended)

    def _count(self, ended: Round) -> None:
        code = ended.code
        if code not in self._codes and len(self._codes) >= _MOST_CODES:
            code = OTHER
        self._codes.add(code)
        self._rounds_ended.labels(ended.model or "", ended.status, code).inc()
        if ended.ended_at is not None:
            self._round.labels(ended.status).observe(max(0.0, ended.ended_at - ended.started_at))
        report = RoundReport.from_bytes(ended.report)
        if report.buffer is not None:
            self._too_old.labels(ended.model or "").inc(len(report.buffer.too_old))
            if ended.status == "completed":
                staleness = self._staleness.labels(ended.model or "")
                for behind, updates in report.ages().items():
                    for _ in range(updates):
                        staleness.observe(behind)
        for phase in report.phases:
            if phase.ended is not None:
                self._phase.labels(phase.phase).observe(max(0.0, phase.ended - phase.started))
                self._expected.labels(phase.phase).inc(phase.expected)
                self._answered.labels(phase.phase).inc(phase.answered)


class _OnDemand:
    def __init__(self, collect: Callable[[], Iterator[Metric]]) -> None:
        self._collect = collect

    def describe(self) -> list[Metric]:
        """Nothing, so that registering does not look."""
        return []

    def collect(self) -> Iterator[Metric]:
        return self._collect()


def gauge(name: str, text: str, label: str | None, values: Mapping[str, float]) -> Metric:
    """A gauge with one label, or, with the one key "", without."""
    family = GaugeMetricFamily(name, text, labels=[] if label is None else [label])
    for key, value in values.items():
        family.add_metric([] if label is None else [key], value)
    return family
