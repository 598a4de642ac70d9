"""Browsers that have signed in: what their cookies open, and links that sign in once.

Sessions and links live in memory: after a restart, people sign in again. Secrets are kept as hashes.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from dataclasses import dataclass, field

from aggregator.access.roles import Principal
from aggregator.access.tokens import InvalidToken

SESSION_COOKIE = "covey_session"
SESSION_SECONDS = 8 * 3600
LINK_SECONDS = 600
_MOST = 1000


@dataclass(frozen=True)
class _Held:
    principal: Principal
    expires: float


@dataclass
class Sessions:
    """The sessions of one process; any thread may call it."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _sessions: dict[bytes, _Held] = field(default_factory=dict)
    _links: dict[bytes, _Held] = field(default_factory=dict)

    def open(self, principal: Principal, now: float) -> str:
        """Opens a session; returns the secret for the browser's cookie.

        Args:
            principal: who has signed in.
            now: seconds since 1970.
        """
        return self._keep(self._sessions, principal, now, SESSION_SECONDS)

    def find(self, secret: str, now: float) -> Principal:
        """Whose session this is.

        Raises:
            InvalidToken: nobody's, or it is over.
        """
        with self._lock:
            found = self._sessions.get(_hash(secret))
        if found is None or found.expires <= now:
            raise InvalidToken("this session is over: sign in again")
        return found.principal

    def close(self, secret: str) -> None:
        """Ends a session; nothing happens when there is none."""
        with self._lock:
            self._sessions.pop(_hash(secret), None)

    def make_link(self, principal: Principal, now: float) -> str:
        """Makes a code that opens one session of this principal, once, within ten minutes."""
        return self._keep(self._links, principal, now, LINK_SECONDS)

    def redeem(self, code: str, now: float) -> str:
        """Turns the code of a link into a session; returns its secret.

        Raises:
            InvalidToken: it was used, is too old, or never was one.
        """
        with self._lock:
            found = self._links.pop(_hash(code), None)
        if found is None or found.expires <= now:
            raise InvalidToken("this link was used, or is too old: `covey console` prints a new one")
        return self.open(found.principal, now)

    def _keep(self, where: dict[bytes, _Held], principal: Principal, now: float, seconds: float) -> str:
        secret = secrets.token_urlsafe(32)
        with self._lock:
            for key in [key for key, held in where.items() if held.expires <= now]:
                del where[key]
            while len(where) >= _MOST:
                # The oldest: dictionaries keep the order of insertion.
                del where[next(iter(where))]
            where[_hash(secret)] = _Held(principal, now + seconds)
        return secret


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
