"""What happens to a round, and what it wants done."""

from __future__ import annotations

from dataclasses import dataclass

from aggregator.records import LogEntry
from protocol.messages import Invitation, RoundEnd
from protocol.secagg.server import ClientMessage, Request


@dataclass(frozen=True)
class MessageReceived:
    """A device's answer came; the broker vouches for the device id."""

    device_id: str
    message: ClientMessage


@dataclass(frozen=True)
class MaskedInputStored:
    """A device's masked input is in the partial sum, in the transaction that this event is logged in."""

    device_id: str


@dataclass(frozen=True)
class DeviceOnline:
    """A device was born, or was heard of again."""

    device_id: str


@dataclass(frozen=True)
class DeviceOffline:
    """A device's last will came."""

    device_id: str


@dataclass(frozen=True)
class DeviceHeard:
    """A device does what it was asked to do, and has not finished: it need not be asked again yet."""

    device_id: str


@dataclass(frozen=True)
class Reconnected:
    """The aggregator is connected to the broker again: births will tell who is online.

    Attributes:
        outage: seconds that no device could be reached; they do not count for the phase.
    """

    outage: float


@dataclass(frozen=True)
class Tick:
    """Time has passed, and devices could be reached."""


Event = MessageReceived | MaskedInputStored | DeviceOnline | DeviceOffline | DeviceHeard | Reconnected | Tick


@dataclass(frozen=True)
class Log:
    """Make this durable before anything that comes after it is sent."""

    entry: LogEntry


@dataclass(frozen=True)
class Send:
    """Send this to a device; nothing is lost if it does not arrive, since it will be sent again."""

    device_id: str
    message: Request | Invitation | RoundEnd


Output = Log | Send
