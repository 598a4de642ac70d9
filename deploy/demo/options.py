"""What a demo is asked to do, and which people, rounds and accidents follow from it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from deploy.demo.result import Dataset, PrivacyMode
from protocol.secagg.parameters import GraphAssumptions, parameters


class DemoError(RuntimeError):
    """The demo cannot be done as asked; the message says what to change."""


class DemoOptions(BaseModel):
    """The options of `covey demo`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # None: one for every person who is not held out.
    devices: int | None = Field(default=None, ge=3)
    # None: as many as the model's recipe says.
    rounds: int | None = Field(default=None, ge=1, le=1000)
    drop: float = Field(default=0.2, ge=0, lt=0.5)
    privacy: PrivacyMode = "distributed"
    dataset: Dataset = "watch"
    # None: a private broker.
    broker: str | None = None
    seed: int = Field(default=1, ge=0, lt=2**63)
    # None: all of them.
    folds: tuple[int, ...] | None = (0,)
    test_people: int = Field(default=1, ge=1)
    report: Path = Path("demo-report")
    # Show the console in a browser; keep serving until Ctrl-C.
    open: bool = False
    keep: bool = False

    @field_validator("broker")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        address = urlsplit(value)
        if address.scheme not in ("mqtt", "mqtts") or not address.hostname:
            raise ValueError("a broker is given as mqtt://host:port or mqtts://host:port")
        if address.username is not None or address.password is not None:
            raise ValueError("no credentials in the address: every user of this machine can read them")
        return value


@dataclass(frozen=True, slots=True)
class Fold:
    """One split of the people, as indices into the data set: who trains, and who tests.

    Attributes:
        index: number of the fold.
        training: a device each.
        testing: on no device.
    """

    index: int
    training: tuple[int, ...]
    testing: tuple[int, ...]


class KillMoment(StrEnum):
    """When in a round a device is killed; its masks are undone in another way after its shares are out."""

    BEFORE_SHARES = "before_shares"
    AFTER_SHARES = "after_shares"


@dataclass(frozen=True, slots=True)
class Kill:
    """One planned accident.

    Attributes:
        round: number of the round, from 1.
        device: index of the device in the fold.
        moment: how far it gets.
    """

    round: int
    device: int
    moment: KillMoment


def parse_folds(text: str) -> tuple[int, ...] | None:
    """Reads `all` as None, and a list such as `0,3,5` as its numbers.

    Raises:
        DemoError: the text is neither.
    """
    if text.strip().lower() == "all":
        return None
    try:
        folds = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        folds = ()
    if not folds or min(folds) < 0:
        raise DemoError(f"--folds takes `all` or numbers such as 0,3, not {text!r}")
    return folds


def plan_folds(options: DemoOptions, people: int) -> tuple[Fold, ...]:
    """Splits people, never their recordings: fold f tests on `test_people` people from f * `test_people` on.

    All folds together test everybody at least once; where the numbers do not divide, the last fold reaches
    back.

    Raises:
        DemoError: there are too few people for the devices, or no such fold.
    """
    testing = options.test_people
    left = people - testing
    devices = left if options.devices is None else options.devices
    if devices > left or left < 3:
        raise DemoError(
            f"{people} people less {testing} held out leave {left}: "
            f"at least 3 and as many as --devices ({devices}) are needed"
        )
    count = -(-people // testing)
    chosen: Sequence[int] = range(count) if options.folds is None else options.folds
    unknown = [fold for fold in chosen if fold >= count]
    if unknown:
        raise DemoError(f"there are folds 0 to {count - 1}, not {unknown[0]}")
    folds = []
    for fold in chosen:
        start = min(fold * testing, people - testing)
        held_out = tuple(range(start, start + testing))
        others = [person for person in range(people) if person not in held_out]
        if devices < len(others):
            order = np.random.default_rng([options.seed, fold]).permutation(len(others))[:devices]
            others = [others[index] for index in sorted(order)]
        folds.append(Fold(fold, tuple(others), held_out))
    return tuple(folds)


def tolerated_dropouts(devices: int) -> int:
    """How many of a complete graph of `devices` may drop out before their sum is lost."""
    return devices - parameters(devices, GraphAssumptions()).threshold


def plan_kills(options: DemoOptions, fold: Fold, rounds: int) -> tuple[Kill, ...]:
    """Which devices are killed when: in each of two rounds, the share `drop` of the fleet.

    The first victim of a round dies after its shares were delivered, the second before, and so on in turn.
    The two rounds stand a third and two thirds through, so that everybody can be seen to come back. At
    least one device is killed where `drop` is not zero, and never more than the threshold tolerates.
    """
    devices = len(fold.training)
    if options.drop == 0:
        return ()
    victims = min(max(1, round(options.drop * devices)), tolerated_dropouts(devices))
    generator = np.random.default_rng([options.seed, fold.index, 1])
    hit = sorted({max(1, rounds // 3), max(1, 2 * rounds // 3)})
    kills = []
    for number in hit:
        for turn, device in enumerate(generator.permutation(devices)[:victims]):
            moment = KillMoment.BEFORE_SHARES if turn % 2 else KillMoment.AFTER_SHARES
            kills.append(Kill(number, int(device), moment))
    return tuple(kills)
