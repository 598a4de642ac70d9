"""What waits for the daemon's loop: events of the link, results of the worker, and the wish to stop."""

from __future__ import annotations

import queue
from dataclasses import dataclass

from edge_client.adapters.mqtt import Inbound, LinkEvent
from edge_client.events import Event

QUEUE_LENGTH = 1024
QUEUE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Stop:
    """End the loop."""


Item = LinkEvent | Event | Stop


class Inbox:
    """What waits for the loop: bounded for the network, never full for this device's own results."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[Item] = queue.SimpleQueue()
        # Two counters with one writer each need no lock.
        self._put_bytes = self._got_bytes = 0

    def from_link(self, event: LinkEvent) -> bool:
        """Takes what the link heard, unless too much waits already."""
        if isinstance(event, Inbound):
            waiting = self._put_bytes - self._got_bytes
            if self._items.qsize() >= QUEUE_LENGTH or waiting + len(event.frame) > QUEUE_BYTES:
                return False
            self._put_bytes += len(event.frame)
        self._items.put(event)
        return True

    def put(self, item: Event | Stop) -> None:
        """Takes a result of the worker, or the wish to stop."""
        self._items.put(item)

    def get(self, timeout: float) -> Item | None:
        """The next item, or None when there is none in time."""
        try:
            item = self._items.get(timeout=max(timeout, 0.0))
        except queue.Empty:
            return None
        if isinstance(item, Inbound):
            self._got_bytes += len(item.frame)
        return item
