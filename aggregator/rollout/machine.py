"""One rollout as a state machine: waves, soaking, gates, and the way back.

Theory of operation. A rollout goes through waves, each a larger part of its pool. Everything that happens is
a function of what was observed: no state is kept beside it.

    Running --wave settled, soaked, gates hold--> Running (next wave) --after the last--> Completed
       |  ^                                                                                  |
     Pause Resume                                                                            |
       v  |                                                                                  |
    Paused --Halt--> Halted --RollBack--> RolledBack <--RollBack-----------------------------+
                                              ^
    Running --a gate fails, or no device of the wave runs it

A wave has settled when each of its devices that is online runs the version or has said that it cannot, and
at least one runs it; then it soaks. A device that is away neither holds a wave up nor counts in its errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, assert_never

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from aggregator.rollout.gates import Gate
from aggregator.rollout.waves import ordered, reach
from protocol.errors import IllegalEvent, MalformedMessage
from protocol.fields import Bytes32, Schema

Percent = Annotated[float, Field(gt=0, le=100)]
Reason = Annotated[str, Field(max_length=300)]
MAX_STEPS = 200


class RolloutSettings(Schema):
    """What a rollout is to do.

    Attributes:
        percents: of the pool that each wave reaches, ascending to 100.
        soak_seconds: how long a settled wave is watched before the next one.
        group: label of the devices that it is for; None for the whole fleet.
        seed: orders the pool.
        replaces: the version that the pool had before, if any: where `rollback` leads after the end.
    """

    percents: Annotated[tuple[Percent, ...], Field(min_length=1, max_length=20)] = (100.0,)
    gates: Annotated[tuple[Gate, ...], Field(max_length=10)] = ()
    soak_seconds: Annotated[float, Field(ge=0, le=30 * 86_400)] = 0.0
    group: str | None = None
    seed: Bytes32
    replaces: int | None = None

    @model_validator(mode="after")
    def _ascending(self) -> RolloutSettings:
        if list(self.percents) != sorted(set(self.percents)) or self.percents[-1] != 100:
            raise ValueError("the percents of the waves rise, and end with 100")
        return self


# --- states ----------------------------------------------------------------------------------------------


class Running(Schema):
    """Wave `wave` (from 0) has the version, or is getting it; it has settled at `settled_at`."""

    kind: Literal["running"] = "running"
    wave: int
    since: float
    settled_at: float | None = None
    waits_for: Reason = ""


class Paused(Schema):
    """Nothing moves, neither forth nor back, until it is resumed."""

    kind: Literal["paused"] = "paused"
    wave: int
    reason: Reason


class Halted(Schema):
    """It will never reach more devices; those of its waves keep the version until it is rolled back."""

    kind: Literal["halted"] = "halted"
    wave: int
    reason: Reason


class RolledBack(Schema):
    """Its devices went back to what they had before; the version is withdrawn."""

    kind: Literal["rolled-back"] = "rolled-back"
    wave: int
    reason: Reason


class Completed(Schema):
    """The whole pool is to have the version from now on."""

    kind: Literal["completed"] = "completed"


RolloutState = Annotated[Running | Paused | Halted | RolledBack | Completed, Field(discriminator="kind")]
RolloutStatus = Literal["running", "paused", "halted", "rolled-back", "completed"]
OPEN: tuple[RolloutStatus, ...] = ("running", "paused", "halted")
"""A rollout in one of these says what the devices of its waves have."""


# --- events ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WaveSight:
    """The devices that the rollout has reached so far.

    Attributes:
        size: all of them.
        serving: those that answer with the version.
        failed: those that said that it does not run there.
        waiting: those that are online, and have done neither yet.
    """

    size: int
    serving: int
    failed: int
    waiting: int

    @property
    def errors(self) -> float:
        """Share of those that have tried the version on which it failed."""
        tried = self.serving + self.failed
        return self.failed / tried if tried else 0.0


@dataclass(frozen=True)
class Observed:
    """A look at the wave.

    Attributes:
        at: seconds since 1970.
        figures: of the latest evaluation of the version, by metric; empty without one.
    """

    at: float
    sight: WaveSight
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Pause:
    """An operator wants nothing to move."""

    reason: str = "by the operator"


@dataclass(frozen=True)
class Resume:
    """An operator lets it go on; the wave soaks anew."""

    at: float


@dataclass(frozen=True)
class Halt:
    """An operator ends it where it is."""

    reason: str = "by the operator"


@dataclass(frozen=True)
class RollBack:
    """An operator takes the version back."""

    reason: str = "by the operator"


Event = Observed | Pause | Resume | Halt | RollBack


def begin(at: float) -> Running:
    """The state of a rollout that starts now."""
    return Running(wave=0, since=at)


def handle(settings: RolloutSettings, state: RolloutState, event: Event) -> RolloutState:
    """Applies one event.

    Raises:
        IllegalEvent: nobody can do this to a rollout in this state; nothing changed.
    """
    match event:
        case Observed():
            return _observed(settings, state, event) if isinstance(state, Running) else state
        case Pause():
            if isinstance(state, Running):
                return Paused(wave=state.wave, reason=event.reason[:300])
        case Resume():
            if isinstance(state, Paused):
                return Running(wave=state.wave, since=event.at)
        case Halt():
            if isinstance(state, Running | Paused):
                return Halted(wave=state.wave, reason=event.reason[:300])
        case RollBack():
            if isinstance(state, Running | Paused | Halted):
                return RolledBack(wave=state.wave, reason=event.reason[:300])
            if isinstance(state, Completed):
                return RolledBack(wave=len(settings.percents) - 1, reason=event.reason[:300])
        case _:
            assert_never(event)
    raise IllegalEvent(f"a rollout that is {state.kind} cannot {_WORDS[type(event)]}")


_WORDS = {Pause: "be paused", Resume: "go on", Halt: "be halted", RollBack: "be rolled back"}


def _observed(settings: RolloutSettings, state: Running, event: Observed) -> RolloutState:
    sight, failing = event.sight, _failing(settings.gates, event)
    if failing:
        return RolledBack(wave=state.wave, reason=failing)
    if sight.waiting == 0 and sight.failed and not sight.serving:
        return RolledBack(wave=state.wave, reason=f"it runs on none of {sight.failed} devices")
    settled = state.settled_at
    if settled is None and sight.waiting == 0 and sight.serving:
        settled = event.at
    waits_for = _waits_for(settings, settled, event)
    if waits_for:
        return state.model_copy(update={"settled_at": settled, "waits_for": waits_for})
    if state.wave + 1 == len(settings.percents):
        return Completed()
    return Running(wave=state.wave + 1, since=event.at)


def _failing(gates: tuple[Gate, ...], event: Observed) -> str:
    """Why the version must go back now; empty when it need not."""
    sight = event.sight
    for gate in gates:
        if gate.metric == "errors":
            # Early, only what no later device can make good is a failure.
            figure = sight.errors if sight.waiting == 0 else sight.failed / max(1, sight.size)
        elif gate.metric in event.figures:
            figure = event.figures[gate.metric]
        else:
            continue
        if not gate.holds(figure):
            return f"the gate {gate} failed: {gate.metric} is {figure:.4g}"
    return ""


def _waits_for(settings: RolloutSettings, settled: float | None, event: Observed) -> str:
    """What the next wave waits for; empty for nothing."""
    sight = event.sight
    if settled is None:
        if sight.waiting:
            return f"{sight.waiting} of {sight.size} devices to try the version"
        return "a device of the wave to come online"
    missing = [g.metric for g in settings.gates if g.metric != "errors" and g.metric not in event.figures]
    if missing:
        return f"an evaluation of the version with its {missing[0]}: see `covey evaluate`"
    soaked = event.at - settled >= settings.soak_seconds
    return "" if soaked else f"the end of its soak of {settings.soak_seconds:g} seconds"


# --- what a rollout holds to -------------------------------------------------------------------------------


def reached(settings: RolloutSettings, state: RolloutState, pool: tuple[str, ...]) -> tuple[str, ...]:
    """The devices that are to have the version because of this rollout, in the order of its waves."""
    if isinstance(state, RolledBack):
        return ()
    order = ordered(pool, settings.seed)
    if isinstance(state, Completed):
        return order
    return order[: reach(len(order), settings.percents[state.wave])]


class Step(Schema):
    """Something that happened to a rollout, for who looks at it later."""

    at: float
    what: RolloutStatus
    wave: int
    detail: str = ""


class Progress(Schema):
    """A rollout's state and how it came to it.

    Attributes:
        steps: every change of state or wave, oldest first.
    """

    state: RolloutState
    steps: Annotated[tuple[Step, ...], Field(max_length=MAX_STEPS)]

    @classmethod
    def begin(cls, at: float) -> Progress:
        """Of a rollout that starts now."""
        return cls(state=begin(at), steps=(Step(at=at, what="running", wave=0),))

    def after(self, state: RolloutState, at: float) -> Progress:
        """With the next state; a step is noted when status or wave have changed."""
        before = self.state
        if (before.kind, getattr(before, "wave", None)) == (state.kind, getattr(state, "wave", None)):
            return Progress(state=state, steps=self.steps)
        wave = getattr(state, "wave", getattr(before, "wave", 0))
        step = Step(at=at, what=state.kind, wave=wave, detail=getattr(state, "reason", ""))
        return Progress(state=state, steps=(*self.steps[-MAX_STEPS + 1 :], step))

    def to_bytes(self) -> bytes:
        """The JSON that the repository keeps."""
        return self.model_dump_json().encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Progress:
        """Parses `to_bytes`."""
        return cls.model_validate_json(data)


_SETTINGS: TypeAdapter[RolloutSettings] = TypeAdapter(RolloutSettings)


def settings_from(data: bytes) -> RolloutSettings:
    """Parses the JSON of settings.

    Raises:
        MalformedMessage: another Covey's.
    """
    try:
        return _SETTINGS.validate_json(data)
    except ValidationError as error:
        raise MalformedMessage(f"unreadable settings of a rollout: {error}") from error
