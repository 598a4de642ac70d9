"""What an operator does about who has which version: rollouts, pins, and taking a version back."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from pydantic import ConfigDict, ValidationError

from aggregator.clock import Clock
from aggregator.records import Device, Pin, Rollout, Version
from aggregator.refusals import NoSuch, OperationRefused, there
from aggregator.registry.publishing import release_of
from aggregator.repository import Reader, Repository, Writer
from aggregator.rollout import machine
from aggregator.rollout.gates import Gate, InvalidGate
from aggregator.rollout.machine import OPEN, Completed, Progress, RolloutSettings, WaveSight
from aggregator.rollout.observing import look
from aggregator.rollout.wanted import pool
from protocol.client_release import CLIENT, ClientRelease, numbered, version_text
from protocol.errors import IllegalEvent

Turn = Literal["pause", "resume", "halt", "rollback"]


@dataclass(frozen=True)
class RolloutRequest:
    """Asks to bring a version to the fleet, or to a group.

    Attributes:
        percent: of the devices that each wave reaches, rising to 100.
        gate: what must hold before the next wave, such as `accuracy>=0.8` and `errors<0.01`.
        soak_seconds: how long a settled wave is watched before the next one.
        group: label of the devices that it is for; None for the whole fleet.
        seed: orders the devices, 64 hexadecimal digits; random by default.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    model: str
    version: int
    percent: tuple[float, ...] = (5.0, 25.0, 100.0)
    gate: tuple[str, ...] = ()
    soak_seconds: float = 0.0
    group: str | None = None
    seed: str | None = None

    def resolve(self, replaces: int | None) -> RolloutSettings:
        """The settings that it asks for.

        Raises:
            OperationRefused: it says what is wrong.
        """
        try:
            return RolloutSettings(
                percents=self.percent,
                gates=tuple(Gate.parse(text) for text in self.gate),
                soak_seconds=self.soak_seconds,
                group=self.group,
                seed=secrets.token_bytes(32) if self.seed is None else bytes.fromhex(self.seed),
                replaces=replaces,
            )
        except InvalidGate as error:
            raise OperationRefused(str(error)) from error
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise OperationRefused(f"{where}: {first['msg']}".removeprefix(": ")) from error
        except ValueError as error:
            raise OperationRefused("the seed has 64 hexadecimal digits") from error


@dataclass(frozen=True)
class RolloutView:
    """A rollout, and how its devices do.

    Attributes:
        sight: of the devices that it has reached; None once it is over.
        devices: those that it is to reach so far, in the order of its waves.
    """

    record: Rollout
    settings: RolloutSettings
    progress: Progress
    sight: WaveSight | None = None
    devices: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, reader: Reader, record: Rollout) -> RolloutView:
        """Reads it."""
        settings = machine.settings_from(record.settings)
        progress = Progress.from_bytes(record.progress)
        devices = machine.reached(settings, progress.state, record.pool)
        sight = look(reader.devices(), record, devices) if record.status in OPEN else None
        return cls(record, settings, progress, sight, devices)


class RolloutOperations:
    """The part of `aggregator.operations.Operator` about who has which version."""

    repository: Repository
    clock: Clock

    # --- rollouts

    def start_rollout(self, request: RolloutRequest) -> RolloutView:
        """Begins to bring a version to the fleet, or to a group, wave by wave.

        Raises:
            NoSuch: there is no such version.
            OperationRefused: it says why, and what to do.
        """
        now = self.clock.moment().unix
        with self.repository.write() as writer:
            version = _version(writer, request.model, request.version)
            pins = writer.pins(request.model)
            replaces = _replaced(writer, request, pins)
            settings = request.resolve(replaces)
            _check_startable(writer, version, replaces)
            active = [each for each in writer.devices() if each.state == "active"]
            if version.model == CLIENT:
                _check_gates(settings)
                active = [each for each in active if _takes(each, release_of(version))]
            devices = pool({each.device_id: each.labels for each in active}, pins, request.group)
            if not devices:
                whom = "the fleet" if request.group is None else f"the group {request.group}"
                able = "can install it and " if version.model == CLIENT else ""
                raise OperationRefused(
                    f"{whom} has no device that {able}is not pinned: see `covey device list`"
                )
            progress = Progress.begin(now)
            record = Rollout(
                rollout_id=secrets.token_hex(16),
                model=request.model,
                version=request.version,
                settings=settings.model_dump_json().encode(),
                pool=devices,
                created_at=now,
                status=progress.state.kind,
                progress=progress.to_bytes(),
            )
            writer.add_rollout(record)
            if version.stage == "candidate":
                writer.set_stage(version.model, version.version, "canary")
            return RolloutView.of(writer, record)

    def rollouts(self, model: str | None = None) -> tuple[RolloutView, ...]:
        """Rollouts, oldest first."""
        with self.repository.read() as reader:
            found = [each for each in reader.rollouts() if model in (None, each.model)]
            return tuple(RolloutView.of(reader, record) for record in found)

    def rollout(self, rollout_id: str) -> RolloutView:
        """One rollout.

        Raises:
            NoSuch: there is none.
        """
        with self.repository.read() as reader:
            return RolloutView.of(reader, _rollout(reader, rollout_id))

    def turn_rollout(self, rollout_id: str, turn: Turn, reason: str = "by the operator") -> RolloutView:
        """Pauses a rollout, lets it go on, ends it where it is, or takes its version back.

        Raises:
            NoSuch: there is none.
            OperationRefused: it is not in a state for that.
        """
        now = self.clock.moment().unix
        event: machine.Event
        if turn == "pause":
            event = machine.Pause(reason)
        elif turn == "resume":
            event = machine.Resume(now)
        elif turn == "halt":
            event = machine.Halt(reason)
        else:
            event = machine.RollBack(reason)
        with self.repository.write() as writer:
            record = _rollout(writer, rollout_id)
            progress = Progress.from_bytes(record.progress)
            settings = machine.settings_from(record.settings)
            if isinstance(progress.state, Completed) and turn == "rollback":
                _check_current(writer, record, settings)
            try:
                state = machine.handle(settings, progress.state, event)
            except IllegalEvent as error:
                raise OperationRefused(f"{error}: see `covey rollout status`") from error
            record = take(writer, record, settings, progress.after(state, now), now)
            return RolloutView.of(writer, record)

    # --- versions

    def withdraw(self, model: str, version: int) -> Version:
        """Takes a version back for good: no device is to have it, and no round begins with it.

        Devices that have it go back to the newest version that is left.

        Raises:
            NoSuch: there is none.
            OperationRefused: a rollout or a pin holds on to it.
        """
        with self.repository.write() as writer:
            found = _version(writer, model, version)
            if any(r.model == model and r.version == version for r in writer.rollouts(*OPEN)):
                raise OperationRefused("a rollout of it is not over: use `covey rollout rollback`")
            if any(pin.version == version for pin in writer.pins(model)):
                raise OperationRefused("it is pinned: use `covey model unpin` first (see `covey model pins`)")
            writer.set_stage(model, version, "withdrawn")
            return replace(found, stage="withdrawn")

    def pin(self, model: str, version: int, *, device: str | None = None, group: str | None = None) -> Pin:
        """Gives a device, or every device with a label, a version that only another pin changes.

        Raises:
            NoSuch: there is no such version or device.
            OperationRefused: the version is withdrawn, or not exactly one target is named.
        """
        now = self.clock.moment().unix
        with self.repository.write() as writer:
            if _version(writer, model, version).stage == "withdrawn":
                raise OperationRefused(f"{model} version {version} was withdrawn: pin another one")
            kind, target = _target(device, group)
            if kind == "device":
                there(writer.device(target), f"no device {target}: see `covey device list`")
            pin = Pin(model, kind, target, version, now)
            writer.set_pin(pin)
            return pin

    def unpin(self, model: str, *, device: str | None = None, group: str | None = None) -> None:
        """Lets a device, or those with a label, have what the fleet has again.

        Raises:
            NoSuch: there is no such pin.
        """
        kind, target = _target(device, group)
        with self.repository.write() as writer:
            known = {(pin.kind, pin.target) for pin in writer.pins(model)}
            if (kind, target) not in known:
                raise NoSuch(f"there is no pin of {model} for {target}: see `covey model pins`")
            writer.drop_pin(model, kind, target)

    def pins(self, model: str | None = None) -> tuple[Pin, ...]:
        """The pins of a model, or all."""
        with self.repository.read() as reader:
            return reader.pins(model)

    def fleet_version(self, model: str) -> int | None:
        """The version that the fleet is to have; None before the first was promoted."""
        with self.repository.read() as reader:
            found = reader.newest_version(model, "stable")
        return None if found is None else found.version


def take(
    writer: Writer, record: Rollout, settings: RolloutSettings, progress: Progress, now: float
) -> Rollout:
    """Makes a rollout's next state true, with what it means for its version."""
    before, state = Progress.from_bytes(record.progress).state, progress.state
    writer.update_rollout(record.rollout_id, state.kind, progress.to_bytes())
    model, version, group = record.model, record.version, settings.group
    if state.kind == "completed" and before.kind != "completed":
        if group is None:
            writer.set_stage(model, version, "stable")
        else:
            writer.set_pin(Pin(model, "group", group, version, now))
    if state.kind == "rolled-back":
        if group is None:
            writer.set_stage(model, version, "withdrawn")
        elif before.kind == "completed" and settings.replaces is not None:
            writer.set_pin(Pin(model, "group", group, settings.replaces, now))
        elif before.kind == "completed":
            writer.drop_pin(model, "group", group)
    return replace(record, status=state.kind, progress=progress.to_bytes())


def _rollout(reader: Reader, rollout_id: str) -> Rollout:
    return there(reader.rollout(rollout_id), f"no rollout {rollout_id}: see `covey rollout status`")


def _version(reader: Reader, model: str, version: int) -> Version:
    what = f"no published {model} version {version}: see `covey model list`"
    return there(reader.version(model, version), what)


def _takes(device: Device, release: ClientRelease) -> bool:
    """Whether a device has root's program, and a system that a release is for."""
    return CLIENT in device.models and release.bundle_for(device.target) is not None


def _check_gates(settings: RolloutSettings) -> None:
    for gate in settings.gates:
        if gate.metric != "errors":
            raise OperationRefused(f"a client has no {gate.metric}: its only gate is errors<N")


def _replaced(reader: Reader, request: RolloutRequest, pins: Sequence[Pin]) -> int | None:
    """The version that the rollout's devices have before."""
    if request.group is not None:
        mine = (pin.version for pin in pins if (pin.kind, pin.target) == ("group", request.group))
        return next(mine, None)
    found = reader.newest_version(request.model, "stable")
    return None if found is None else found.version


def _check_startable(reader: Reader, version: Version, replaces: int | None) -> None:
    name = f"{version.model} version {numbered(version.version, version.model)}"
    if version.stage == "withdrawn":
        raise OperationRefused(f"{name} was withdrawn: publish another one")
    for rollout in reader.rollouts(*OPEN):
        if rollout.model == version.model:
            other = f"{rollout.model} version {numbered(rollout.version, rollout.model)}"
            raise OperationRefused(
                f"a rollout of {other} is {rollout.status}: let it end, or "
                f"use `covey rollout rollback {rollout.rollout_id}`"
            )
    if replaces == version.version:
        raise OperationRefused(
            f"{name} is what these devices are to have already. A fleet whose versions are to wait for a "
            'rollout has "promotion": "manual" in aggregator.json'
        )
    if replaces is not None and version.version < replaces:
        if version.model == CLIENT:
            raise OperationRefused(
                f"{name} is older than {version_text(replaces)}, which the fleet is to have: go back with "
                "`covey rollout rollback`"
            )
        raise OperationRefused(
            f"{name} is older than {replaces}: go back with `covey model withdraw {version.model} --version "
            f"{replaces}`, or pin it"
        )


def _check_current(reader: Reader, record: Rollout, settings: RolloutSettings) -> None:
    """A rollout that was completed is taken back only while its version is still the one to have."""
    if settings.group is None:
        found = reader.newest_version(record.model, "stable")
        current = None if found is None else found.version
    else:
        pins = reader.pins(record.model)
        mine = (pin.version for pin in pins if (pin.kind, pin.target) == ("group", settings.group))
        current = next(mine, None)
    if current != record.version:
        raise OperationRefused(
            f"version {record.version} is not what its devices are to have any more, but {current}: "
            "use `covey model withdraw`"
        )


def _target(device: str | None, group: str | None) -> tuple[Literal["device", "group"], str]:
    if device is not None and group is None:
        return "device", device
    if group is not None and device is None:
        return "group", group
    raise OperationRefused("name one device, or one group")
