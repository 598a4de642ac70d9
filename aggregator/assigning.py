"""Says who is to have which version: promotes, moves rollouts on, and tells the devices.

What devices are to have follows from what is durable: stages, pins and rollouts. What they were told is
durable, too, and whatever of it differs is signed and told anew. So a crash between any two steps loses
nothing, and nothing is done twice: the next look finds what is left to do.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from aggregator.clock import Clock, Moment
from aggregator.fleet.authority import Authority
from aggregator.records import Assigned, Device, Rollout, Version
from aggregator.repository import Reader, Repository
from aggregator.rollout import machine
from aggregator.rollout.machine import OPEN, Observed, Progress, Running, reached, settings_from
from aggregator.rollout.observing import look
from aggregator.rollout.wanted import Reached, own_version
from aggregator.rollout_operations import take
from aggregator.rounds.evaluation import VersionEvaluation
from aggregator.work import Work
from protocol.client_release import CLIENT
from protocol.version_assignment import VersionAssignment

logger = logging.getLogger(__name__)

MAX_SHARE = 0.05
"""Of the service's time that looking may take: a pin or a rollout makes it look at every device."""
BATCH = 256
"""Devices that are told something in one transaction."""


class Promotion(StrEnum):
    """What becomes of a new version by itself.

    AUTO gives it to the fleet, unless a rollout of its model is not over; MANUAL leaves it a candidate until
    a rollout has brought it to everybody.
    """

    AUTO = "auto"
    MANUAL = "manual"


@dataclass(frozen=True)
class _Due:
    """What a look at the repository finds to do; in this order, since each step can make the next one due."""

    promoted: tuple[Version, ...]
    moved: tuple[tuple[Rollout, Progress], ...]
    told: tuple[Assigned, ...]

    def __bool__(self) -> bool:
        return bool(self.promoted or self.moved or self.told)


class Assigner:
    """Belongs to the main loop; all that it holds in memory is what is still to be published."""

    def __init__(self, authority: Authority, clock: Clock, promotion: Promotion) -> None:
        """Prepares it; the first tick tells everybody again."""
        self._authority = authority
        self._clock = clock
        self._promotion = promotion
        self._unsent: dict[tuple[str, str], None] = {}
        self._again = True
        self._look_at = float("-inf")

    def reconnected(self) -> None:
        """Takes in that the broker may have forgotten what it retained."""
        self._again = True

    def unsent(self, model: str, device_id: str) -> None:
        """Takes in that an announcement could not be published: it is, later."""
        self._unsent[model, device_id] = None

    def tick(self, work: Work, repository: Repository) -> None:
        """Does what is due.

        Args:
            work: what changes, and what is published.
            repository: to look, without a lock.
        """
        if self._again:
            self._again = False
            with repository.read() as reader:
                for model in _models(reader):
                    self._unsent[model, ""] = None
                    self._unsent |= {(model, row.device_id): None for row in reader.assigned_devices(model)}
        if work.at.clock >= self._look_at:
            began = self._clock.moment().clock
            with repository.read() as reader:
                due = self._due(reader, work.at)
            now = self._clock.moment().clock
            self._look_at = now + (now - began) / MAX_SHARE
            if due:
                self._do(work)
        self._publish(work, repository)

    # --- what is due

    def _due(self, reader: Reader, at: Moment) -> _Due:
        models = _models(reader)
        rollouts = reader.rollouts(*OPEN)
        needed = bool(rollouts) or bool(reader.pins())
        devices = reader.devices() if needed else ()
        promoted = self._promoted(reader, models, rollouts)
        moved = tuple(_moved(reader, rollouts, devices, at))
        told = tuple(self._told(reader, models, rollouts, devices if needed else None, at))
        return _Due(promoted, moved, told)

    def _do(self, work: Work) -> None:
        """Looks again, inside the transaction, and does what it finds, step by step."""
        writer, at = work.writer, work.at
        for version in self._promoted(writer, _models(writer), writer.rollouts(*OPEN)):
            writer.set_stage(version.model, version.version, "stable")
            logger.info("%s version %d is stable", version.model, version.version)
        rollouts = writer.rollouts(*OPEN)
        devices = writer.devices() if rollouts or writer.pins() else None
        for rollout, progress in _moved(writer, rollouts, devices or (), at):
            before = Progress.from_bytes(rollout.progress).state
            take(writer, rollout, settings_from(rollout.settings), progress, at.unix)
            if before.kind != progress.state.kind or len(progress.steps) > 1:
                reason = getattr(progress.state, "reason", "")
                logger.info(
                    "rollout %s of %s version %d: %s%s",
                    rollout.rollout_id[:8],
                    rollout.model,
                    rollout.version,
                    progress.state.kind,
                    f": {reason}" if reason else "",
                )
        for assigned in self._told(writer, _models(writer), writer.rollouts(*OPEN), devices, at):
            writer.assign(assigned)
            self._unsent[assigned.model, assigned.device_id] = None
            # What is not told in this batch is told in the next.
            self._look_at = at.clock

    def _promoted(
        self, reader: Reader, models: Iterable[str], rollouts: tuple[Rollout, ...]
    ) -> tuple[Version, ...]:
        if self._promotion is Promotion.MANUAL:
            return ()
        held = {rollout.model for rollout in rollouts}
        # What devices run is changed by a rollout alone.
        newest = (
            reader.newest_version(model, "candidate", "stable")
            for model in models
            if model not in held and model != CLIENT
        )
        return tuple(version for version in newest if version is not None and version.stage == "candidate")

    def _told(
        self,
        reader: Reader,
        models: Iterable[str],
        rollouts: tuple[Rollout, ...],
        devices: tuple[Device, ...] | None,
        at: Moment,
    ) -> Iterator[Assigned]:
        """What the fleet and its devices are to be told, at most a batch of it.

        Args:
            devices: None when no device can be to have a version of its own.
        """
        left = BATCH
        for model in models:
            fleet = reader.newest_version(model, "stable")
            row = reader.assigned(model)
            if fleet is not None and (row is None or row.version != fleet.version):
                yield self._sign(reader, model, "", fleet, row, at)
            found = reader.assigned_devices(model, of_its_own=devices is None)
            rows = {row.device_id: row for row in found}
            pins, open_one = reader.pins(model), _reached(model, rollouts)
            labels = {device.device_id: device.labels for device in devices or ()}
            for device_id in sorted(labels.keys() | rows.keys()):
                wanted = own_version(device_id, labels.get(device_id, ()), pins, open_one)
                before = rows.get(device_id)
                if wanted == (None if before is None else before.version):
                    continue
                version = None if wanted is None else reader.version(model, wanted)
                if left == 0:
                    return
                left -= 1
                yield self._sign(reader, model, device_id, version, before, at)

    def _sign(
        self,
        reader: Reader,
        model: str,
        device_id: str,
        version: Version | None,
        before: Assigned | None,
        at: Moment,
    ) -> Assigned:
        """Signs what the fleet, or a device, is to have.

        The sequence is the time, so that it rises even when the database comes back from a backup.
        """
        sequence = max(1, int(at.unix), 0 if before is None else before.sequence + 1)
        aim = version or reader.newest_version(model, "stable")
        newest = reader.newest_version(model)
        assignment = VersionAssignment(
            fleet=self._authority.fleet,
            model=model,
            device=device_id or None,
            version=None if version is None else version.version,
            manifest_sha256=None if version is None else version.manifest_sha256,
            sequence=sequence,
            # Any device may have had any newer one meanwhile.
            rollback=aim is not None and newest is not None and aim.version < newest.version,
        )
        document = self._authority.sign_assignment(assignment).model_dump_json().encode()
        return Assigned(model, device_id, sequence, assignment.version, document)

    def _publish(self, work: Work, repository: Repository) -> None:
        if not self._unsent:
            return
        batch = list(self._unsent)[:BATCH]
        # In a transaction that changes something, only its writer sees the change.
        with repository.read() as reader:
            source = work.writer if work.writing else reader
            for key in batch:
                del self._unsent[key]
                model, device_id = key
                row = source.assigned(model, device_id)
                if row is not None:
                    version = None if row.version is None else source.version(model, row.version)
                    work.announce(row, version)


def _models(reader: Reader) -> tuple[str, ...]:
    return tuple(version.model for version in reader.newest_versions())


def _reached(model: str, rollouts: Iterable[Rollout]) -> Reached | None:
    for rollout in rollouts:
        if rollout.model == model:
            state = Progress.from_bytes(rollout.progress).state
            devices = reached(settings_from(rollout.settings), state, rollout.pool)
            return Reached(rollout.version, frozenset(devices))
    return None


def _moved(
    reader: Reader, rollouts: Iterable[Rollout], devices: Iterable[Device], at: Moment
) -> Iterator[tuple[Rollout, Progress]]:
    """The rollouts that go on by themselves, and where to."""
    for rollout in rollouts:
        progress, settings = Progress.from_bytes(rollout.progress), settings_from(rollout.settings)
        if not isinstance(progress.state, Running):
            continue
        sight = look(devices, rollout, reached(settings, progress.state, rollout.pool))
        event = Observed(at.unix, sight, _figures(reader, rollout))
        state = machine.handle(settings, progress.state, event)
        if state != progress.state:
            yield rollout, progress.after(state, at.unix)


def _figures(reader: Reader, rollout: Rollout) -> dict[str, float]:
    found = reader.evaluations(rollout.model, rollout.version)
    if not found:
        return {}
    metrics = VersionEvaluation.from_bytes(found[-1].figures).metrics
    return {name: figure.mean for name, figure in metrics.items()}
