"""What a rollout sees of the fleet: how its devices do, and which version the fleet is to have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from aggregator.records import Device, Rollout, Version
from aggregator.rollout.machine import WaveSight


def look(devices: Iterable[Device], rollout: Rollout, reached: Sequence[str]) -> WaveSight:
    """How the devices that a rollout has reached do, by what they last said."""
    among = frozenset(reached)
    serving = failed = waiting = 0
    for device in devices:
        if device.device_id not in among:
            continue
        failure = device.failures.get(rollout.model)
        if failure is not None and failure.version == rollout.version:
            failed += 1
        elif device.models.get(rollout.model) == rollout.version:
            serving += 1
        elif device.online:
            waiting += 1
    return WaveSight(size=len(among), serving=serving, failed=failed, waiting=waiting)


def fleet_version(versions: Iterable[Version]) -> Version | None:
    """The version that the fleet is to have: the newest stable one."""
    return max(
        (version for version in versions if version.stage == "stable"),
        key=lambda version: version.version,
        default=None,
    )


def base_version(versions: Iterable[Version]) -> Version | None:
    """The version that training goes on from: the newest one that was not withdrawn.

    Candidates count: the rounds of a campaign build on each other before anybody promotes what comes of them.
    """
    return max(
        (version for version in versions if version.stage != "withdrawn"),
        key=lambda version: version.version,
        default=None,
    )
