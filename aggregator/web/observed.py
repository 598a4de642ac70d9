"""A repository that tells an event feed what was written, once it is durable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from aggregator.records import (
    Campaign,
    CampaignStatus,
    Device,
    Pin,
    Rollout,
    Round,
    RoundEnding,
    Stage,
    Version,
)
from aggregator.repository import Reader, Repository, Writer
from aggregator.rollout.machine import Progress
from aggregator.rounds.report import RoundReport
from protocol.messages import DeviceStatus


class Listener(Protocol):
    """Somebody who is told, such as an `EventFeed`."""

    def publish(self, kind: str, data: Mapping[str, Any]) -> None:
        """Takes in an event; never blocks, never raises."""
        ...


@dataclass(frozen=True)
class ObservedRepository:
    """Passes everything on; what a committed transaction changed becomes events, in its order."""

    inner: Repository
    feed: Listener
    others: tuple[Listener, ...] = ()

    def read(self) -> AbstractContextManager[Reader]:
        """See `Repository`."""
        return self.inner.read()

    @contextmanager
    def write(self) -> Iterator[Writer]:
        """See `Repository`."""
        with self.inner.write() as writer:
            observer = _Observer(writer)
            # What it does not watch it passes on: together that is a writer.
            yield cast(Writer, observer)
        for kind, data in observer.seen:
            for listener in (self.feed, *self.others):
                listener.publish(kind, data)

    def close(self) -> None:
        """See `Repository`."""
        self.inner.close()


@dataclass
class _Observer:
    _writer: Writer
    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def _note(self, kind: str, **data: Any) -> None:
        self.seen.append((kind, data))

    def add_device(self, device: Device) -> None:
        self._writer.add_device(device)
        self._note("device", device=device.device_id, change="enrolled")

    def set_exclusion(self, device_id: str, reason: str | None) -> None:
        self._writer.set_exclusion(device_id, reason)
        self._note("device", device=device_id, change="excluded" if reason else "included", reason=reason)

    def set_labels(self, device_id: str, labels: tuple[str, ...]) -> None:
        self._writer.set_labels(device_id, labels)
        self._note("device", device=device_id, change="labelled", labels=list(labels))

    def note_status(self, device_id: str, status: DeviceStatus, at: float) -> None:
        self._writer.note_status(device_id, status, at)
        change = "online" if status.online else "offline"
        self._note("device", device=device_id, change=change, models=dict(status.models), at=at)

    def add_version(self, version: Version) -> None:
        self._writer.add_version(version)
        self._note("version", model=version.model, version=version.version, round=version.round_id)

    def set_stage(self, model: str, version: int, stage: Stage) -> None:
        self._writer.set_stage(model, version, stage)
        self._note("version", model=model, version=version, stage=stage)

    def set_pin(self, pin: Pin) -> None:
        self._writer.set_pin(pin)
        self._note("pin", model=pin.model, of=pin.kind, target=pin.target, version=pin.version)

    def drop_pin(self, model: str, kind: str, target: str) -> None:
        self._writer.drop_pin(model, kind, target)
        self._note("pin", model=model, of=kind, target=target, version=None)

    def add_rollout(self, rollout: Rollout) -> None:
        self._writer.add_rollout(rollout)
        self._note(
            "rollout",
            rollout=rollout.rollout_id,
            model=rollout.model,
            version=rollout.version,
            status=rollout.status,
        )

    def update_rollout(self, rollout_id: str, status: str, progress: bytes) -> None:
        self._writer.update_rollout(rollout_id, status, progress)
        state = Progress.from_bytes(progress).state
        self._note("rollout", rollout=rollout_id, status=status, wave=getattr(state, "wave", None))

    def add_campaign(self, campaign: Campaign) -> None:
        self._writer.add_campaign(campaign)
        self._note("campaign", campaign=campaign.campaign_id, model=campaign.model, status=campaign.status)

    def update_campaign(self, campaign_id: str, status: CampaignStatus, note: str = "") -> None:
        self._writer.update_campaign(campaign_id, status, note)
        self._note("campaign", campaign=campaign_id, status=status, note=note)

    def begin_round(self, round_: Round) -> None:
        self._writer.begin_round(round_)
        self._note(
            "round",
            round=round_.round_id,
            campaign=round_.campaign_id,
            number=round_.number,
            model=round_.model,
            status="running",
        )

    def save_report(self, round_id: str, report: bytes) -> None:
        self._writer.save_report(round_id, report)
        phases = RoundReport.from_bytes(report).phases
        if phases:
            now = phases[-1]
            self._note(
                "round",
                round=round_id,
                status="running",
                phase=now.phase,
                answered=now.answered,
                expected=now.expected,
            )

    def end_round(self, ending: RoundEnding) -> None:
        self._writer.end_round(ending)
        version = ending.version
        self._note(
            "round",
            round=ending.round_id,
            status=ending.status,
            code=ending.code,
            version=None if version is None else version.version,
        )
        if version is not None:
            self._note("version", model=version.model, version=version.version, round=version.round_id)
