"""Time as the core sees it: a moment that an adapter of the clock hands in."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Moment:
    """One instant on two clocks.

    Attributes:
        clock: monotonic seconds of this process, for deadlines: setting the system clock does not move it.
        unix: seconds since 1970, for certificates, plans and records.
    """

    clock: float
    unix: float


class Clock(Protocol):
    """Tells the time."""

    def moment(self) -> Moment:
        """The present instant."""
        ...


class SystemClock:
    """The clocks of the operating system."""

    def moment(self) -> Moment:
        """The present instant."""
        return Moment(time.monotonic(), time.time())
