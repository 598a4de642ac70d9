"""What a device makes of the answer to its ticket: whether to come again, and when. Pure."""

from __future__ import annotations

FIRST_WAIT_SECONDS = 2.0
LONGEST_WAIT_SECONDS = 300.0

FINAL = frozenset(
    {"token-unknown", "token-used", "token-expired", "token-revoked", "enrolment-refused", "invalid-request"}
)
"""Codes of refusals that stand however often the device comes again."""


class EnrolmentFailed(Exception):
    """A device is not enrolled; the message says what to do. It may come again with the same ticket.

    Attributes:
        seconds: come again after this long at the earliest; 0 when the service did not say.
    """

    def __init__(self, message: str, *, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.seconds = seconds


class Unreachable(EnrolmentFailed):
    """Nobody answers at the ticket's address, or what answers is no fleet's API."""


class WrongTrust(EnrolmentFailed):
    """Who answers is not the service that the ticket was made by; no secret was sent."""


class NotNow(EnrolmentFailed):
    """The service enrols nobody at the moment."""


class WrongClock(EnrolmentFailed):
    """The service's own clock contradicts its certificate."""


class TicketRefused(EnrolmentFailed):
    """The service lets nobody in by this ticket, now or later.

    Attributes:
        code: of `FINAL`.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def refusal(status: int, code: str, detail: str, retry_after: float) -> EnrolmentFailed:
    """What the answer of a service is that enrols nobody.

    Args:
        status: of HTTP.
        code: of the problem; empty when the answer was none.
        detail: what it says to do.
        retry_after: seconds; 0 when it did not say.
    """
    if code in FINAL:
        return TicketRefused(code, detail)
    if code:
        return NotNow(f"the service enrols nobody now: {detail}", seconds=retry_after)
    return Unreachable(f"what answers there is no API of a fleet: its answer was {status}")


def wait_seconds(attempt: int, chance: float, at_least: float = 0.0) -> float:
    """How long to wait after a failed attempt: twice as long each time, and spread over devices.

    A fleet whose power comes back at once must not come at once.

    Args:
        attempt: 0 after the first one.
        chance: uniform in [0, 1).
        at_least: what the service asked for, seconds.
    """
    longest = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0 ** min(attempt, 16))
    return max(at_least, 0.0) + longest * (0.5 + 0.5 * chance)
