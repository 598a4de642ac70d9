"""The MQTT topic tree, in one place.

    covey/v1/dev/{device}/up/status     retained birth and last will of a device
    covey/v1/dev/{device}/up/msg        control messages to the aggregator
    covey/v1/dev/{device}/up/chunk      chunks of an upload
    covey/v1/dev/{device}/down/msg      control messages to the device
    covey/v1/dev/{device}/down/chunk    chunks of a download
    covey/v1/dev/{device}/down/model-{name}  retained: the version that this device is to have
    covey/v1/bcast/model/{name}         retained: the version that every other device is to have

A device may publish under its own `up` and subscribe to its own `down` and to `bcast`, nothing else.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

ROOT = "covey/v1"
UpChannel = Literal["status", "msg", "chunk"]
DownChannel = Literal["msg", "chunk"]
UP_CHANNELS: tuple[UpChannel, ...] = get_args(UpChannel)

_UP = re.compile(rf"^{ROOT}/dev/([a-z0-9][a-z0-9-]{{0,62}})/up/(status|msg|chunk)$", re.ASCII)

UPLINKS = f"{ROOT}/dev/+/up/+"
"""What the aggregator subscribes to."""

MODELS = f"{ROOT}/bcast/model/+"
"""What every device subscribes to besides its own downlinks."""


def up(device_id: str, channel: UpChannel) -> str:
    """The topic on which a device publishes."""
    return f"{ROOT}/dev/{device_id}/up/{channel}"


def down(device_id: str, channel: DownChannel) -> str:
    """The topic on which the aggregator publishes to one device."""
    return f"{ROOT}/dev/{device_id}/down/{channel}"


def downlinks(device_id: str) -> str:
    """The subscription of one device to what the aggregator sends to it."""
    return f"{ROOT}/dev/{device_id}/down/+"


def model(name: str) -> str:
    """The retained topic that announces the version of a model that the fleet is to have."""
    return f"{ROOT}/bcast/model/{name}"


def own_model(device_id: str, name: str) -> str:
    """The retained topic that announces the version of a model that one device is to have."""
    return f"{ROOT}/dev/{device_id}/down/model-{name}"


def parse_up(topic: str) -> tuple[str, UpChannel] | None:
    """Returns (device id, channel) of an uplink topic, or None for any other topic."""
    match = _UP.fullmatch(topic)
    return (match[1], match[2]) if match else None  # type: ignore[return-value]
