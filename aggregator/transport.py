"""What the service needs of the network: a pipe that may lose, repeat and reorder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Connected:
    """The broker accepted the connection and the subscriptions; retained births follow."""


@dataclass(frozen=True)
class Disconnected:
    """The connection is gone; nobody can be reached until `Connected`."""


@dataclass(frozen=True)
class Delivery:
    """A message came. It comes again, after a new connection, unless it is acknowledged.

    Attributes:
        token: what the transport needs to acknowledge it.
        arrived: when it came, on the monotonic clock; 0 where nobody measures.
    """

    topic: str
    payload: bytes
    token: object = None
    arrived: float = 0.0


Inbound = Connected | Disconnected | Delivery


class Transport(Protocol):
    """A connection to the broker that renews itself."""

    def receive(self, limit: int, timeout: float) -> list[Inbound]:
        """Waits up to `timeout` seconds for something to come; returns at most `limit` of it, in order."""
        ...

    def acknowledge(self, delivery: Delivery) -> None:
        """Says that a delivery is durably accounted for."""
        ...

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """Hands a message to the broker, if there is room; whatever matters is sent again anyway."""
        ...

    def busy(self) -> bool:
        """Whether so much waits to be sent that bulk data should be asked for again later."""
        ...

    def reset(self) -> None:
        """Connects anew, so that what was not acknowledged comes again."""
        ...
