"""Live events: what happens, as it happens, to everybody who listens.

The feed keeps the latest events in memory, so a listener that was away for a moment misses none of them. It
does not outlive the process: whoever comes back after a restart, or too late, is told to `reset`, which means
to read again what it shows.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

KEPT = 4096
KEEPALIVE_SECONDS = 15.0


@dataclass(frozen=True)
class Event:
    """Something happened.

    Attributes:
        number: 1, 2, ... in this process.
        kind: `device`, `version`, `rollout`, `pin`, `campaign`, `round`, or what a later part of the service
            names.
        data: JSON; names the resource and what changed.
        at: seconds since 1970.
    """

    number: int
    kind: str
    data: Mapping[str, Any]
    at: float


@dataclass
class EventFeed:
    """The events of one process; any thread publishes, any event loop listens."""

    kept: int = KEPT
    clock: Callable[[], float] = time.time
    epoch: str = field(default_factory=lambda: secrets.token_hex(4))
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _events: deque[Event] = field(init=False)
    _number: int = 0
    _closed: bool = False
    _listeners: dict[object, Callable[[], None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Starts out empty."""
        self._events = deque(maxlen=self.kept)

    def publish(self, kind: str, data: Mapping[str, Any]) -> None:
        """Tells everybody; never blocks."""
        with self._lock:
            self._number += 1
            self._events.append(Event(self._number, kind, data, self.clock()))
            wake = tuple(self._listeners.values())
        for each in wake:
            each()

    def close(self) -> None:
        """Ends every listener, as when the service stops."""
        with self._lock:
            self._closed = True
            wake = tuple(self._listeners.values())
        for each in wake:
            each()

    def position(self, last_id: str | None) -> int | None:
        """Number of the event after which to go on; None when events in between are gone.

        Args:
            last_id: what the listener saw last; None to begin with the next one.
        """
        with self._lock:
            if last_id is None:
                return self._number
            epoch, _, number = last_id.partition("-")
            if epoch != self.epoch or not (number.isascii() and number.isdigit() and len(number) < 16):
                return None
            oldest = self._events[0].number if self._events else self._number + 1
            return int(number) if oldest - 1 <= int(number) <= self._number else None

    def after(self, number: int) -> tuple[Event, ...] | None:
        """The events after this one; None when some of them are gone."""
        with self._lock:
            if self._events and self._events[0].number > number + 1:
                return None
            missing = self._number - number
            return tuple(self._events)[-missing:] if missing > 0 else ()

    def latest(self, most: int) -> tuple[Event, ...]:
        """The latest events that are kept, newest first."""
        with self._lock:
            return tuple(reversed(self._events))[:most]

    @property
    def closed(self) -> bool:
        """Whether the service stops."""
        return self._closed

    def id_of(self, number: int) -> str:
        """What a listener gives back to go on after this event."""
        return f"{self.epoch}-{number}"

    async def stream(
        self, last_id: str | None, valid: Callable[[], bool], keepalive: float = KEEPALIVE_SECONDS
    ) -> AsyncIterator[str]:
        """Server-Sent Events, until the feed closes or the listener is no longer welcome.

        Args:
            last_id: what the listener saw last.
            valid: whether the listener may still listen; asked, on a thread, at every keepalive.
            keepalive: seconds between comments that show that the connection lives.
        """
        loop, awake = asyncio.get_running_loop(), asyncio.Event()
        key = object()

        def wake() -> None:
            # The loop may be gone when the service stops.
            if not loop.is_closed():
                loop.call_soon_threadsafe(awake.set)

        with self._lock:
            self._listeners[key] = wake
        try:
            found = self.position(last_id)
            at = self.position(None) if found is None else found
            yield "retry: 2000\n" + _framed(self.id_of(at or 0), "reset" if found is None else "hello", {})
            while not self._closed:
                awake.clear()
                events = self.after(at or 0)
                if events is None:
                    at = self.position(None)
                    yield _framed(self.id_of(at or 0), "reset", {})
                    continue
                for event in events:
                    at = event.number
                    yield _framed(self.id_of(at), event.kind, event.data)
                try:
                    await asyncio.wait_for(awake.wait(), keepalive)
                except TimeoutError:
                    if not await asyncio.to_thread(valid):
                        return
                    yield ": alive\n\n"
        finally:
            with self._lock:
                del self._listeners[key]


def _framed(event_id: str, kind: str, data: Mapping[str, Any]) -> str:
    # JSON on one line: no line break of the data can end the field.
    return f"id: {event_id}\nevent: {kind}\ndata: {json.dumps(data)}\n\n"
