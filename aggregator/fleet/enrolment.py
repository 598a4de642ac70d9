"""Enrolment tokens: each lets one device into the fleet, once, under the name recorded with it. Pure.

A token has the form of `protocol.enrolment.EnrolmentSecret`: a public id that finds the record, and 256
random bits of which only the SHA-256 is kept. A fast hash is right here, as for `aggregator.access.tokens`.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from typing import Literal

from pydantic import ValidationError

from aggregator.refusals import OperationRefused
from protocol.enrolment import EnrolmentTicket
from protocol.fields import Slug

ID_BYTES = 6
SECRET_BYTES = 32

RefusalCode = Literal["token-unknown", "token-used", "token-expired", "token-revoked"]


class TokenRefused(Exception):
    """An enrolment token that lets nobody in; the message says what to do.

    Attributes:
        code: stable, for the device.
    """

    def __init__(self, code: RefusalCode, detail: str) -> None:
        super().__init__(detail)
        self.code = code


@dataclass(frozen=True)
class EnrolmentToken:
    """What is kept of a token.

    Attributes:
        token_id: 12 hexadecimal digits, public.
        secret_sha256: hash of the secret.
        name: id of the device that it lets in.
        labels: that the device gets, sorted.
        replaces: whether the device may take the place of an enrolled one of this name.
        created_at: seconds since 1970, as all times.
        created_by: name of the principal that made it.
        used_at: None while nobody came with it.
        key_id: of the key that came with it (`protocol.identity.key_id`).
    """

    token_id: str
    secret_sha256: bytes = field(repr=False)
    name: Slug
    labels: tuple[str, ...]
    replaces: bool
    created_at: float
    expires_at: float
    created_by: str
    revoked_at: float | None = None
    used_at: float | None = None
    key_id: str | None = None


def make_enrolment_token(
    random: bytes,
    *,
    name: Slug,
    labels: tuple[str, ...],
    replaces: bool,
    now: float,
    seconds: float,
    created_by: str,
) -> tuple[str, EnrolmentToken]:
    """Makes a token; returns (the token, to be shown once; its record).

    Args:
        random: 38 fresh random bytes.
        name: id of the device that it lets in.
        labels: that the device gets.
        replaces: whether the device may take the place of an enrolled one of this name.
        now: seconds since 1970.
        seconds: how long it is valid.
        created_by: name of the principal that makes it.
    """
    if len(random) != ID_BYTES + SECRET_BYTES:
        raise ValueError(f"an enrolment token takes {ID_BYTES + SECRET_BYTES} random bytes")
    token_id, secret = random[:ID_BYTES].hex(), random[ID_BYTES:]
    record = EnrolmentToken(
        token_id=token_id,
        secret_sha256=_hash(secret),
        name=name,
        labels=tuple(sorted(set(labels))),
        replaces=replaces,
        created_at=now,
        expires_at=now + seconds,
        created_by=created_by,
    )
    return f"{token_id}_{secret.hex()}", record


def check_token(token: str, record: EnrolmentToken | None, key_id: str, now: float) -> EnrolmentToken:
    """Checks that a key may be enrolled by a token, now or once more.

    The same key may come again while the token is valid: its first answer may have been lost.

    Args:
        token: as the device sent it.
        record: of the token's id, if there is one.
        key_id: of the key that the device proved to have.
        now: seconds since 1970.

    Raises:
        TokenRefused: it says why. Only who has the secret learns more than that it is unknown.
    """
    expected = bytes(32) if record is None else record.secret_sha256
    matches = hmac.compare_digest(_hash(bytes.fromhex(token.partition("_")[2])), expected)
    if record is None or not matches:
        raise TokenRefused(
            "token-unknown", "this ticket is not one of this fleet's: ask its operator for one"
        )
    if record.revoked_at is not None:
        raise TokenRefused("token-revoked", "this ticket was revoked: ask the fleet's operator for a new one")
    if now >= record.expires_at:
        raise TokenRefused("token-expired", "this ticket has expired: ask the fleet's operator for a new one")
    if record.used_at is not None and not hmac.compare_digest(record.key_id or "", key_id):
        raise TokenRefused(
            "token-used",
            f"another device was enrolled as {record.name} with this ticket: if that was not yours, have the "
            "fleet's operator revoke it; ask for a new ticket",
        )
    return record


def status(token: EnrolmentToken, now: float) -> Literal["open", "used", "expired", "revoked"]:
    """What became of a token: `open` lets a device in."""
    if token.used_at is not None:
        return "used"
    if token.revoked_at is not None:
        return "revoked"
    return "open" if now < token.expires_at else "expired"


def token_id_of(token: str) -> str:
    """The public part of a token that has the form of one."""
    return token.partition("_")[0]


def _hash(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


@dataclass(frozen=True)
class Doorway:
    """How devices come in, and where they go then.

    Attributes:
        url: of the API, as devices reach it; None when nobody has said it.
        trust: DER of the certificate by which the API's own is checked; None when that is not known.
        broker: address of the broker, as devices reach it.
    """

    url: str | None = None
    trust: bytes | None = None
    broker: str | None = None

    def ticket(self, name: Slug, token: str, url: str | None = None) -> EnrolmentTicket:
        """The ticket that a device comes in by.

        Args:
            name: id of the device.
            token: as `make_enrolment_token` made it.
            url: of the API, in place of the usual one.

        Raises:
            OperationRefused: no device could use it; the message says what to do.
        """
        if (address := url or self.url) is None:
            raise OperationRefused(
                "say where devices reach the API: --url https://HOST:8443, or `api_url` in aggregator.json"
            )
        if self.trust is None:
            raise OperationRefused(
                "the API shows a certificate that is not of the fleet's CA: name who issued it, a PEM file, "
                "as `api_ca` in aggregator.json"
            )
        try:
            return EnrolmentTicket(
                url=address.rstrip("/"),
                name=name,
                token=token,
                trust_sha256=hashlib.sha256(self.trust).hexdigest(),
            )
        except ValidationError as error:
            if error.errors()[0]["loc"] == ("name",):
                raise OperationRefused(
                    f"{name} is no device id: it has lower-case letters, digits and hyphens, at most 63"
                ) from error
            raise OperationRefused(f"{address} is no address for devices: write https://HOST:8443") from error
