"""Who is online, from births, last wills and the messages themselves."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from protocol.messages import DeviceStatus

STRAY_SECONDS = 2.0
"""How long after a will messages that the device sent before it may still arrive."""


class Change(Enum):
    """What a message says about its device's presence."""

    BORN = "born"
    GONE = "gone"
    NOTHING = "nothing"


@dataclass
class _Seen:
    session: bytes | None
    online: bool
    since: float


class Presence:
    """What is known of every device since the broker was last connected; births are retained, so all of it.

    Not persistent and not shared: it belongs to the one main loop.
    """

    def __init__(self) -> None:
        """Starts out knowing nobody."""
        self._seen: dict[str, _Seen] = {}

    def reset(self) -> None:
        """Forgets everything, as on connecting: retained births are about to come again."""
        self._seen.clear()

    def status(self, device_id: str, message: DeviceStatus, clock: float) -> Change:
        """Takes in a birth or a will. The late will of an old session says nothing about the present one."""
        seen = self._seen.get(device_id)
        if message.online:
            self._seen[device_id] = _Seen(message.session, True, clock)
            return Change.BORN
        if seen is not None and seen.online and seen.session not in (None, message.session):
            return Change.NOTHING
        self._seen[device_id] = _Seen(message.session, False, clock)
        return Change.GONE

    def heard(self, device_id: str, clock: float) -> Change:
        """Takes in any other message: whoever speaks is there, even when the birth was lost."""
        seen = self._seen.get(device_id)
        if seen is not None and (seen.online or clock - seen.since < STRAY_SECONDS):
            return Change.NOTHING
        self._seen[device_id] = _Seen(None if seen is None else seen.session, True, clock)
        return Change.BORN

    def forget(self, device_id: str) -> None:
        """Takes in that a device is not of the fleet any more."""
        self._seen.pop(device_id, None)

    def online(self) -> frozenset[str]:
        """The devices that are there."""
        return frozenset(device_id for device_id, seen in self._seen.items() if seen.online)
