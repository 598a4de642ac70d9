"""How much anybody may ask for: bytes of a request, requests a minute."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aggregator.web.limit_settings import Limits
from aggregator.web.problems import ApiProblem, respond
from aggregator.web.schemas import PREFIX
from protocol.enrolment import ENROLMENTS_PATH

CONSOLE_UPLOAD = "/models"
"""Where the console's form takes a model."""
_UPLOADS = frozenset({f"{PREFIX}/versions", f"{PREFIX}/client/releases", CONSOLE_UPLOAD})
_CLOSE = {"Connection": "close"}


@dataclass
class RateLimiter:
    """Counts requests over the last minute, in memory: a restart forgives."""

    limits: Limits
    _counter: MovingWindowRateLimiter = field(
        default_factory=lambda: MovingWindowRateLimiter(MemoryStorage())
    )

    def address(self, address: str) -> None:
        """Counts a request of an address.

        Raises:
            ApiProblem: too many of them, or too many failures.
        """
        failures = parse(self.limits.failures)
        if not self._counter.test(failures, "failures", address):
            raise self._problem(failures, "failures", address)
        self._hit(parse(self.limits.per_address), "address", address)

    def principal(self, name: str) -> None:
        """Counts a request of somebody.

        Raises:
            ApiProblem: too many of them.
        """
        self._hit(parse(self.limits.per_principal), "principal", name)

    def enrolment(self, address: str) -> None:
        """Counts a request of a device that wants to be let in.

        Raises:
            ApiProblem: too many of them.
        """
        self._hit(parse(self.limits.enrolments), "enrolment", address)

    def failure(self, address: str) -> None:
        """Counts credentials that opened nothing."""
        self._counter.hit(parse(self.limits.failures), "failures", address)

    def _hit(self, item: RateLimitItem, kind: str, who: str) -> None:
        if not self._counter.hit(item, kind, who):
            raise self._problem(item, kind, who)

    def _problem(self, item: RateLimitItem, kind: str, who: str) -> ApiProblem:
        again = self._counter.get_window_stats(item, kind, who).reset_time
        seconds = max(1, math.ceil(again - time.time()))
        return ApiProblem("rate-limited", f"try again in {seconds} seconds", {"Retry-After": str(seconds)})


class BodyLimit:
    """Refuses a request that is too large: by its Content-Length, else as soon as it has shown to be.

    The rest is not read: the connection closes.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        """Wraps an application."""
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, counting."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        uploads = scope["method"] == "POST" and scope["path"] in _UPLOADS
        most = self._limits.upload_bytes if uploads else self._limits.body_bytes
        if scope["path"] == ENROLMENTS_PATH:
            most = self._limits.enrolment_bytes
        detail = f"at most {most:,} bytes are taken here"
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > most:
            await respond("too-large", detail, headers=_CLOSE)(scope, receive, send)
            return
        came = 0

        async def counted() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > most:
                raise HTTPException(413, detail, headers=_CLOSE)
            return message

        await self._app(scope, counted, send)
