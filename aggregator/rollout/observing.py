"""What a rollout sees of the fleet: how its devices do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from aggregator.records import Device, Rollout
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
