"""What the handlers stand on, put together by `aggregator.main` or by a test."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass, field

from fastapi import FastAPI, Request

from aggregator.access.roles import Principal, Role
from aggregator.fleet.authority import Authority
from aggregator.operations import Operator
from aggregator.telemetry.metrics import ServiceMetrics
from aggregator.web.events import EventFeed
from aggregator.web.limit_settings import Limits
from aggregator.web.limits import RateLimiter
from aggregator.web.oidc import Oidc
from aggregator.web.sessions import Sessions


@dataclass(frozen=True)
class Vitals:
    """Whether the service can do its work.

    Attributes:
        broker: it is connected.
        loop: its main loop turns.
        trouble: why it cannot do all of its work, such as a full disk; empty when it can.
    """

    broker: bool
    loop: bool
    trouble: str = ""


@dataclass(frozen=True)
class LocalKey:
    """What opens the API to whoever can read the state directory: their files are theirs anyway.

    Attributes:
        secret_sha256: of a random token that lives as long as the process.
        user: for the audit log.
    """

    secret_sha256: bytes
    user: str

    @classmethod
    def of(cls, token: str, user: str) -> LocalKey:
        """For a token that `new_local_token` made."""
        return cls(hashlib.sha256(token.encode()).digest(), user)

    def open(self, token: str) -> Principal | None:
        """Who has this token; None when it is another one."""
        if not hmac.compare_digest(hashlib.sha256(token.encode()).digest(), self.secret_sha256):
            return None
        return Principal(f"local:{self.user}", Role.ADMIN)


@dataclass(frozen=True)
class Context:
    """One aggregator, as its API sees it.

    Attributes:
        operator: the operations; its authority holds no CA key.
        enrolling: loads the authority with the CA's key, for the one enrolment that needs it.
        vitals: of the service; None when none runs in this process.
        metrics: what it counts; None when none runs in this process.
    """

    operator: Operator
    enrolling: Callable[[], Authority]
    feed: EventFeed = field(default_factory=EventFeed)
    limits: Limits = field(default_factory=Limits)
    local: LocalKey | None = None
    oidc: Oidc | None = None
    vitals: Callable[[], Vitals] | None = None
    metrics: ServiceMetrics | None = None
    sessions: Sessions = field(default_factory=Sessions)
    limiter: RateLimiter = field(init=False)

    def __post_init__(self) -> None:
        """Prepares the limiter."""
        object.__setattr__(self, "limiter", RateLimiter(self.limits))


def context_of(request: Request) -> Context:
    """The context of the application that serves this request."""
    return context_of_app(request.app)


def context_of_app(app: FastAPI) -> Context:
    """The context of an application that `create_app` made."""
    context = app.state.covey
    if not isinstance(context, Context):
        raise TypeError("the application was not made by create_app")
    return context
