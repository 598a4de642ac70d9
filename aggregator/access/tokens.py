"""Bearer tokens: made once, shown once, kept as a hash.

A token is `covey_<id>_<secret>`. The id, public, finds the record; the secret is 256 random bits. Only its
SHA-256 is stored: a fast hash is right here, because nobody can search 2^256 secrets, and slow ones only make
requests slow. Hashes are compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass, field

from aggregator.access.roles import Role

ID_BYTES = 6
SECRET_BYTES = 32
_FORM = re.compile(r"covey_([0-9a-f]{12})_([0-9a-f]{64})")


class InvalidToken(Exception):
    """A token that opens nothing; the message says why, as far as its owner may know."""


@dataclass(frozen=True)
class TokenRecord:
    """What is kept of a token.

    Attributes:
        token_id: 12 hexadecimal digits, public.
        secret_sha256: hash of the secret.
        label: what its maker calls it.
        created_at: seconds since 1970.
        expires_at: seconds since 1970; every token expires.
        created_by: name of the principal.
        revoked_at: seconds since 1970; None while it is valid.
    """

    token_id: str
    secret_sha256: bytes = field(repr=False)
    role: Role
    label: str
    created_at: float
    expires_at: float
    created_by: str
    revoked_at: float | None = None


def make_token(
    random: bytes, *, role: Role, label: str, now: float, seconds: float, created_by: str
) -> tuple[str, TokenRecord]:
    """Makes a token; returns (the token, to be shown once; its record).

    Args:
        random: 38 fresh random bytes.
        role: what it allows.
        label: what its maker calls it.
        now: seconds since 1970.
        seconds: how long it is valid.
        created_by: name of the principal that makes it.
    """
    if len(random) != ID_BYTES + SECRET_BYTES:
        raise ValueError(f"a token takes {ID_BYTES + SECRET_BYTES} random bytes")
    token_id, secret = random[:ID_BYTES].hex(), random[ID_BYTES:]
    record = TokenRecord(token_id, _hash(secret), role, label, now, now + seconds, created_by)
    return f"covey_{token_id}_{secret.hex()}", record


def token_id(token: str) -> str:
    """The public part of a token.

    Raises:
        InvalidToken: it has not the form of one.
    """
    return _parse(token)[0]


def check(token: str, record: TokenRecord | None, now: float) -> Role:
    """Checks a token against the record of its id; returns its role.

    Raises:
        InvalidToken: no such token, wrong secret, revoked or expired. Only who has the secret learns which.
    """
    secret = _parse(token)[1]
    expected = bytes(32) if record is None else record.secret_sha256
    matches = hmac.compare_digest(_hash(secret), expected)
    return check_record(record if matches else None, now)


def check_record(record: TokenRecord | None, now: float) -> Role:
    """Checks that a token is still one; returns its role. For who has shown its secret before.

    Raises:
        InvalidToken: no such token, revoked or expired.
    """
    if record is None:
        raise InvalidToken("this token is not one of this aggregator's: ask its admin for one")
    if record.revoked_at is not None:
        raise InvalidToken("this token was revoked: ask an admin for a new one")
    if now >= record.expires_at:
        raise InvalidToken("this token has expired: ask an admin for a new one (`covey token create`)")
    return record.role


def _parse(token: str) -> tuple[str, bytes]:
    found = _FORM.fullmatch(token)
    if found is None:
        raise InvalidToken("this is not a token of Covey: one looks like covey_<12 digits>_<64 digits>")
    return found[1], bytes.fromhex(found[2])


def _hash(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()
