"""The demo's accidents: which device is frozen, killed and brought back at which moment of a round.

A device is stopped as soon as the aggregator has the message after which it is to fail, and killed once the
phase that it must not answer has begun. Without the stop a fast device would answer before the kill. It comes
back, as a service manager would bring it back, when the phase that it missed is over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from deploy.demo.options import Kill, KillMoment

PHASES = ("AdvertiseKeys", "ShareKeys", "MaskedInput", "ConsistencyCheck", "Unmasking")


@dataclass(frozen=True, slots=True)
class Sight:
    """What can be seen of the running round.

    Attributes:
        number: of the round, from 1.
        phase: name of its phase; empty once it has ended.
        said: device -> types of the messages that the aggregator has of it.
        stored: devices whose masked input is in the sum.
    """

    number: int
    phase: str
    said: Mapping[str, frozenset[str]]
    stored: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Action:
    """What to do to one device process."""

    kind: Literal["freeze", "kill", "restart"]
    device: str


@dataclass(slots=True)
class _Accident:
    kill: Kill
    device: str
    stage: Literal["planned", "frozen", "killed", "over"] = "planned"


class Accidents:
    """Decides, from one sight of the round to the next, what happens to whom."""

    def __init__(self, kills: Iterable[Kill], devices: Sequence[str]) -> None:
        """Plans `kills` for the named devices."""
        self._devices = tuple(devices)
        self._accidents = [_Accident(kill, devices[kill.device]) for kill in kills]

    @property
    def down(self) -> frozenset[str]:
        """Devices that are frozen or dead on purpose."""
        return frozenset(a.device for a in self._accidents if a.stage in ("frozen", "killed"))

    @property
    def killed(self) -> tuple[tuple[int, str, KillMoment], ...]:
        """(round, device, moment) of every kill that was carried out."""
        done = (a for a in self._accidents if a.stage in ("killed", "over"))
        return tuple((a.kill.round, a.device, a.kill.moment) for a in done)

    def step(self, sight: Sight) -> list[Action]:
        """What to do now; call it often while a round runs, and once after its end."""
        actions = []
        for accident in self._accidents:
            action = self._step(accident, sight)
            if action is not None:
                actions.append(action)
        return actions

    def _step(self, accident: _Accident, sight: Sight) -> Action | None:
        last, missed = _MOMENTS[accident.kill.moment]
        if accident.stage == "killed":
            if sight.number != accident.kill.round or _after(sight.phase, missed):
                accident.stage = "over"
                return Action("restart", accident.device)
            return None
        if sight.number != accident.kill.round or accident.stage == "over":
            return self._release(accident)
        if accident.stage == "planned" and self._too_late(accident.device, accident.kill.moment, sight):
            accident.device = self._another(accident, sight) or accident.device
        if last not in sight.said.get(accident.device, frozenset()):
            return None
        if self._too_late(accident.device, accident.kill.moment, sight):
            return self._release(accident)
        if sight.phase == missed:
            accident.stage = "killed"
            return Action("kill", accident.device)
        if accident.stage == "planned" and not _after(sight.phase, missed):
            accident.stage = "frozen"
            return Action("freeze", accident.device)
        return None

    def _release(self, accident: _Accident) -> Action | None:
        """A frozen device whose moment has passed is killed all the same: it must not stay frozen."""
        if accident.stage != "frozen":
            return None
        accident.stage = "killed"
        return Action("kill", accident.device)

    def _too_late(self, device: str, moment: KillMoment, sight: Sight) -> bool:
        if moment is KillMoment.BEFORE_SHARES:
            return "share-keys" in sight.said.get(device, frozenset())
        return device in sight.stored

    def _another(self, accident: _Accident, sight: Sight) -> str | None:
        taken = {other.device for other in self._accidents}
        last, _ = _MOMENTS[accident.kill.moment]
        for device in self._devices:
            if (
                device not in taken
                and last in sight.said.get(device, frozenset())
                and not self._too_late(device, accident.kill.moment, sight)
            ):
                return device
        return None


_MOMENTS = {
    # what the device still says, and the phase that it misses
    KillMoment.BEFORE_SHARES: ("advertise-keys", "ShareKeys"),
    KillMoment.AFTER_SHARES: ("share-keys", "MaskedInput"),
}


def _after(phase: str, other: str) -> bool:
    return not phase or PHASES.index(phase) > PHASES.index(other)
