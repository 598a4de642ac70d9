"""People by OpenID Connect: authorization code with PKCE for browsers, the issuer's tokens as bearers.

The issuer says who somebody is; `roles` in the settings says what a value of the role claim allows.
Signatures are checked against the issuer's published keys, which are kept for ten minutes, and fetched anew,
at most once a minute, when a token is signed by none of them.
"""

from __future__ import annotations

import hmac
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from authlib.oauth2.rfc6749.parameters import prepare_grant_uri, prepare_token_request
from authlib.oauth2.rfc7636 import create_s256_code_challenge
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet

from aggregator.access.roles import Principal, Role
from aggregator.access.tokens import InvalidToken
from aggregator.web.oidc_settings import OidcSettings
from aggregator.web.problems import ApiProblem

LOGIN_COOKIE = "covey_login"
LOGIN_SECONDS = 600
_KEYS_SECONDS = 600
_RENEW_SECONDS = 60
_TIMEOUT_SECONDS = 10.0
_LEEWAY_SECONDS = 60
_MOST_LOGINS = 1000
# Public-key signatures only: with an HMAC, whoever may check a token could also make one.
_ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "ES512", "EdDSA", "Ed25519"]


@dataclass(frozen=True)
class _Pending:
    verifier: str
    nonce: str
    expires: float


@dataclass
class Oidc:
    """One issuer. Any thread may call it."""

    settings: OidcSettings
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _metadata: dict[str, Any] = field(default_factory=dict)
    _keys: KeySet | None = None
    _fetched: float = float("-inf")
    _pending: dict[str, _Pending] = field(default_factory=dict)

    # --- bearer tokens

    def bearer(self, token: str, now: float) -> Principal:
        """Checks an ID or access token of the issuer.

        Args:
            token: a signed JWT.
            now: seconds since 1970.

        Raises:
            InvalidToken: not the issuer's, not for this service, expired, or of somebody without a role.
        """
        return self._principal(self._claims(token, now))

    def _claims(self, token: str, now: float) -> dict[str, Any]:
        try:
            claims = self._decode(token)
        except (JoseError, ValueError, TypeError) as error:
            raise InvalidToken("this token is not signed by the issuer's keys: sign in again") from error
        wanted = {self.settings.client_id, *self.settings.audiences}
        audience = claims.get("aud")
        given = {audience} if isinstance(audience, str) else set(audience or ())
        if claims.get("iss") != self.settings.issuer or not wanted & given:
            raise InvalidToken("this token is of another issuer, or for another service")
        expires, begins = claims.get("exp"), claims.get("nbf", 0)
        if not isinstance(expires, int | float) or now >= expires + _LEEWAY_SECONDS:
            raise InvalidToken("this token has expired: sign in again")
        if not isinstance(begins, int | float) or now < begins - _LEEWAY_SECONDS:
            raise InvalidToken("this token is not valid yet: check the clocks")
        return claims

    def _decode(self, token: str) -> dict[str, Any]:
        try:
            return dict(jwt.decode(token, self._key_set(renew=False), algorithms=_ALGORITHMS).claims)
        except (JoseError, ValueError):
            # The issuer may have changed its keys.
            keys = self._key_set(renew=True)
            return dict(jwt.decode(token, keys, algorithms=_ALGORITHMS).claims)

    def _principal(self, claims: Mapping[str, Any]) -> Principal:
        given = claims.get(self.settings.role_claim)
        values = [given] if isinstance(given, str) else given if isinstance(given, list) else []
        roles = [self.settings.roles[v] for v in values if isinstance(v, str) and v in self.settings.roles]
        name = str(claims.get(self.settings.name_claim) or claims.get("sub") or "somebody")[:100]
        if not roles:
            raise InvalidToken(
                f"{name} has no role here: `roles` in aggregator.json names none of "
                f"their {self.settings.role_claim}"
            )
        return Principal(f"oidc:{name}", max(roles, key=tuple(Role).index))

    # --- browsers

    def login(self, redirect: str, now: float) -> tuple[str, str]:
        """Begins to sign in; returns (address to send the browser to, state to keep in its cookie).

        Args:
            redirect: where the issuer sends the browser back to.
            now: seconds since 1970.
        """
        state, nonce, verifier = (secrets.token_urlsafe(32) for _ in range(3))
        address = prepare_grant_uri(
            self._endpoint("authorization_endpoint"),
            self.settings.client_id,
            "code",
            redirect_uri=redirect,
            scope=self.settings.scopes,
            state=state,
            nonce=nonce,
            code_challenge=create_s256_code_challenge(verifier),
            code_challenge_method="S256",
        )
        with self._lock:
            self._pending = {k: p for k, p in self._pending.items() if p.expires > now}
            if len(self._pending) >= _MOST_LOGINS:
                raise ApiProblem("rate-limited", "too many people are signing in: try again in a minute")
            self._pending[state] = _Pending(verifier, nonce, now + LOGIN_SECONDS)
        return str(address), state

    def callback(self, redirect: str, code: str, state: str, cookie: str, now: float) -> Principal:
        """Ends signing in; returns who it is.

        Args:
            redirect: as given to `login`.
            code: from the issuer, by way of the browser.
            state: likewise.
            cookie: the state in the cookie of the browser that began.
            now: seconds since 1970.

        Raises:
            InvalidToken: not the browser that began, too late, or the issuer says no.
        """
        with self._lock:
            pending = self._pending.pop(state, None)
        mine = hmac.compare_digest(state.encode(), cookie.encode())
        if pending is None or not mine or pending.expires <= now:
            raise InvalidToken("this sign-in was not begun here, or took too long: begin again")
        answer = self._exchange(redirect, code, pending.verifier)
        claims = self._claims(str(answer.get("id_token") or ""), now)
        if not hmac.compare_digest(str(claims.get("nonce", "")).encode(), pending.nonce.encode()):
            raise InvalidToken("the issuer answered another sign-in: begin again")
        return self._principal(claims)

    # --- the issuer

    def _exchange(self, redirect: str, code: str, verifier: str) -> dict[str, Any]:
        settings = self.settings
        body = prepare_token_request(
            "authorization_code",
            redirect_uri=redirect,
            code=code,
            code_verifier=verifier,
            client_id=settings.client_id,
        )
        secret = settings.client_secret_file
        try:
            answer = httpx.post(
                self._endpoint("token_endpoint"),
                content=body,
                headers={"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"},
                auth=None if secret is None else (settings.client_id, secret.read_text().strip()),
                timeout=_TIMEOUT_SECONDS,
            )
            answer.raise_for_status()
            return dict(answer.json())
        except (httpx.HTTPError, ValueError, TypeError) as error:
            raise InvalidToken("the issuer did not confirm the sign-in: begin again") from error

    def _endpoint(self, name: str) -> str:
        with self._lock:
            if not self._metadata:
                self._metadata = self._discover()
            return str(self._metadata[name])

    def _key_set(self, *, renew: bool) -> KeySet:
        address = self._endpoint("jwks_uri")
        with self._lock:
            age = time.monotonic() - self._fetched
            if self._keys is None or age > _KEYS_SECONDS or (renew and age > _RENEW_SECONDS):
                self._keys = KeySet.import_key_set(_get(address))
                self._fetched = time.monotonic()
            return self._keys

    def _discover(self) -> dict[str, Any]:
        found = _get(self.settings.issuer.rstrip("/") + "/.well-known/openid-configuration")
        if found.get("issuer") != self.settings.issuer:
            raise ApiProblem(
                "unavailable", f"the provider is not {self.settings.issuer}: check aggregator.json"
            )
        return dict(found)


def looks_like_jwt(token: str) -> bool:
    """Whether this has the form of a signed JWT."""
    return token.count(".") == 2


def _get(address: str) -> Any:
    try:
        answer = httpx.get(address, timeout=_TIMEOUT_SECONDS)
        answer.raise_for_status()
        return answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise ApiProblem("unavailable", f"the OIDC issuer does not answer: {type(error).__name__}") from error
