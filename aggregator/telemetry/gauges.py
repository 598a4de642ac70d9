"""Gauges: how things stand when somebody looks."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from cryptography import x509
from prometheus_client.core import Metric

from aggregator.repository import Reader, Repository, RepositoryError
from aggregator.rounds.report import RoundReport
from aggregator.telemetry.metrics import gauge
from protocol.client_release import CLIENT

logger = logging.getLogger(__name__)

LAST_ROUNDS = 8
"""How far back a round that spent something is looked for."""


class Gauges:
    """What is read from the repository, from the service and from certificates.

    Epsilon is that of the newest round's report: working it out takes 50 MB and a moment.
    """

    def __init__(
        self,
        repository: Repository,
        ready: Callable[[], Mapping[str, bool]],
        certificates: Mapping[str, Path],
    ) -> None:
        """Prepares them.

        Args:
            ready: name of each thing that the service needs -> whether it has it.
            certificates: PEM files by what they are for; those that are not there are left out.
        """
        self._repository = repository
        self._ready = ready
        self._certificates = dict(certificates)
        self._spent: tuple[str, dict[str, float]] = ("", {})

    def collect(self) -> Iterator[Metric]:
        """Reads everything; what cannot be read is left out, and `covey_ready` says so."""
        ready = dict(self._ready())
        try:
            yield from self._stored()
            ready["storage"] = True
        except RepositoryError as error:
            logger.warning("metrics without the database: %s", error)
            ready["storage"] = False
        yield gauge(
            "covey_ready",
            "Whether the service has what it needs.",
            "what",
            {name: float(value) for name, value in ready.items()},
        )
        yield gauge(
            "covey_certificate_expires_timestamp_seconds",
            "When a certificate ends, seconds since 1970.",
            "certificate",
            {name: end for name, path in self._certificates.items() if (end := _expiry(path)) is not None},
        )

    def _stored(self) -> Iterator[Metric]:
        with self._repository.read() as reader:
            fleet = reader.fleet_size()
            statuses = Counter(each.status for each in reader.campaigns("waiting", "running"))
            running = len(reader.rounds(status="running"))
            newest = {v.model: float(v.version) for v in reader.newest_versions() if v.model != CLIENT}
            spent = self._newest_epsilon(reader)
        yield gauge(
            "covey_devices",
            "Devices of the fleet.",
            "state",
            {"enrolled": fleet.enrolled, "online": fleet.online, "excluded": fleet.excluded},
        )
        yield gauge(
            "covey_campaigns",
            "Campaigns that are not over.",
            "status",
            {status: float(statuses[status]) for status in ("waiting", "running")},
        )
        yield gauge("covey_rounds_running", "Rounds that run now.", None, {"": float(running)})
        yield gauge("covey_model_version", "Newest version of each model.", "model", newest)
        yield gauge(
            "covey_epsilon_spent",
            "Privacy spent by the fleet over all rounds so far, at this delta.",
            "delta",
            spent,
        )

    def _newest_epsilon(self, reader: Reader) -> dict[str, float]:
        """Delta -> epsilon; empty when no recent round spent any."""
        ended = [each for each in reader.rounds(last=LAST_ROUNDS) if each.status != "running"]
        newest = ended[-1].round_id if ended else ""
        if newest != self._spent[0]:
            found: dict[str, float] = {}
            for each in reversed(ended):
                report = RoundReport.from_bytes(each.report)
                if report.epsilon is not None:
                    found = {f"{report.delta:g}": report.epsilon}
                    break
            self._spent = (newest, found)
        return self._spent[1]


def _expiry(path: Path) -> float | None:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc.timestamp()
    except (OSError, ValueError):
        return None
