"""What the API says of rollouts and pins."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field

from aggregator import records
from aggregator.rollout.machine import Completed, RolledBack, RolloutStatus, Running
from aggregator.rollout_operations import RolloutView
from aggregator.web.schemas import ApiModel, Label, Request, Text
from protocol.fields import Slug


class RolloutSight(ApiModel):
    """How the devices that a rollout has reached do.

    Attributes:
        serving: answer with the version.
        failed: it does not run there.
        waiting: online, and have not tried it yet.
        errors: share of those that have tried it on which it failed.
    """

    size: int
    serving: int
    failed: int
    waiting: int
    errors: float


class RolloutStep(ApiModel):
    """Something that happened to a rollout."""

    at: float
    what: RolloutStatus
    wave: int
    detail: str


class Rollout(ApiModel):
    """A version on its way to the fleet, or to a group.

    Attributes:
        group: label of the devices that it is for; None for the fleet.
        replaces: the version that they had before.
        percents: of the pool that each wave reaches.
        wave: the present one, from 1.
        percent: of the pool that is to have the version now.
        pool: how many devices it is for.
        seed: orders the pool, hexadecimal.
        note: what it waits for, or why it ended.
        sight: None once it is over.
        steps: what happened, oldest first.
    """

    rollout: str
    model: str
    version: int
    group: str | None
    replaces: int | None
    status: RolloutStatus
    percents: tuple[float, ...]
    gates: tuple[str, ...]
    soak_seconds: float
    wave: int
    percent: float
    pool: int
    seed: str
    note: str
    created_at: float
    sight: RolloutSight | None
    steps: tuple[RolloutStep, ...]

    @classmethod
    def of(cls, view: RolloutView) -> Self:
        """From the record."""
        r, settings, state = view.record, view.settings, view.progress.state
        wave = len(settings.percents) - 1 if isinstance(state, Completed) else state.wave
        note = "" if isinstance(state, Completed) else getattr(state, "reason", "")
        if isinstance(state, Running) and state.waits_for:
            note = f"waits for {state.waits_for}"
        sight = view.sight
        return cls(
            rollout=r.rollout_id,
            model=r.model,
            version=r.version,
            group=settings.group,
            replaces=settings.replaces,
            status=state.kind,
            percents=settings.percents,
            gates=tuple(str(gate) for gate in settings.gates),
            soak_seconds=settings.soak_seconds,
            wave=wave + 1,
            percent=0.0 if isinstance(state, RolledBack) else settings.percents[wave],
            pool=len(r.pool),
            seed=settings.seed.hex(),
            note=note,
            created_at=r.created_at,
            sight=None
            if sight is None
            else RolloutSight(
                size=sight.size,
                serving=sight.serving,
                failed=sight.failed,
                waiting=sight.waiting,
                errors=sight.errors,
            ),
            steps=tuple(RolloutStep(**step.model_dump()) for step in view.progress.steps),
        )


class RolloutDevices(ApiModel):
    """Who has the version because of a rollout: anybody can work it out again from seed and pool.

    Attributes:
        devices: that it has reached, in the order of its waves.
        pool: all that it is for, by id.
        seed: the order is that of SHA-256(seed + device id), hexadecimal.
    """

    devices: tuple[str, ...]
    pool: tuple[str, ...]
    seed: str

    @classmethod
    def of(cls, view: RolloutView) -> Self:
        """From the record."""
        return cls(devices=view.devices, pool=view.record.pool, seed=view.settings.seed.hex())


class Because(Request):
    """Why an operator does it."""

    reason: Annotated[Text, Field(min_length=1)] = "by the operator"


class PinRequest(Request):
    """Asks to give a device or a group a version of its own; exactly one of the two is named."""

    model: Slug
    version: Annotated[int, Field(ge=1, lt=2**31)]
    device: Slug | None = None
    group: Label | None = None


class UnpinRequest(Request):
    """Asks to remove a pin; exactly one target is named."""

    model: Slug
    device: Slug | None = None
    group: Label | None = None


class Pin(ApiModel):
    """A device or a group with a version of its own."""

    model: str
    version: int
    kind: Literal["device", "group"]
    target: str
    at: float

    @classmethod
    def of(cls, pin: records.Pin) -> Self:
        """From the record."""
        return cls(model=pin.model, version=pin.version, kind=pin.kind, target=pin.target, at=pin.at)
