"""Which version each device is to have: by a pin, a rollout, its group, or as the fleet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from aggregator.records import Pin


@dataclass(frozen=True)
class Reached:
    """The devices that an open rollout of the model has reached."""

    version: int
    devices: frozenset[str]


def own_version(
    device_id: str, labels: Iterable[str], pins: Sequence[Pin], rollout: Reached | None
) -> int | None:
    """The version of one model that a device is to have, where that is not the fleet's; else None.

    The first that applies: its own pin, the rollout that has reached it, the newest pin of one of its labels.

    Args:
        device_id: of the device.
        labels: of the device.
        pins: of the model.
        rollout: of the model, the one that is open, if any.
    """
    for pin in pins:
        if pin.kind == "device" and pin.target == device_id:
            return pin.version
    if rollout is not None and device_id in rollout.devices:
        return rollout.version
    mine = frozenset(labels)
    groups = [pin for pin in pins if pin.kind == "group" and pin.target in mine]
    return max(groups, key=lambda pin: (pin.at, pin.target)).version if groups else None


def pool(devices: Mapping[str, Iterable[str]], pins: Sequence[Pin], group: str | None) -> tuple[str, ...]:
    """The devices that a rollout is for: those of its group, or those that have no version of their own.

    Args:
        devices: device id -> labels.
        pins: of the model.
        group: label of the rollout; None for the fleet.
    """
    alone = {pin.target for pin in pins if pin.kind == "device"}
    pinned = {pin.target for pin in pins if pin.kind == "group"}
    return tuple(
        device_id
        for device_id, labels in sorted(devices.items())
        if device_id not in alone and (group in labels if group is not None else pinned.isdisjoint(labels))
    )
