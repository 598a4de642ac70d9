"""X25519 key agreement (RFC 7748) on raw 32-byte keys, and what Covey derives from it."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from protocol.errors import BadSignature
from protocol.secagg.prg import derive_key

PrivateKey = bytes | X25519PrivateKey
"""32 raw bytes, or what `load_private` made of them."""

_FIELD = 2**255 - 19
_LOW_ORDER = frozenset(
    {
        0,
        1,
        _FIELD - 1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
    }
)
"""Every u coordinate of Curve25519 and its twist whose point has order 1, 2, 4 or 8."""


def load_private(private: PrivateKey) -> X25519PrivateKey:
    """Prepares a private key of 32 bytes for many agreements: that costs as much as an agreement itself."""
    return private if isinstance(private, X25519PrivateKey) else X25519PrivateKey.from_private_bytes(private)


def public_key(private: PrivateKey) -> bytes:
    """Returns the public key, 32 bytes, of a private key."""
    return load_private(private).public_key().public_bytes_raw()


def check_public_key(public: bytes) -> None:
    """Refuses a public key that no private key has, before others depend on it.

    Guarantee: `agree` succeeds with whatever passes here, and a key that is recovered from its shares has the
        very bytes that were advertised.

    Raises:
        BadSignature: a low-order point, or a coordinate that is not reduced.
    """
    coordinate = int.from_bytes(public, "little")
    if coordinate >= _FIELD:
        raise BadSignature("an X25519 key is not in its canonical form")
    if coordinate in _LOW_ORDER:
        raise BadSignature("an X25519 key is of low order")


def exchange(private: PrivateKey, public: bytes) -> bytes:
    """Computes the 32 secret bytes that two clients share; keys are derived from them, never these used.

    Raises:
        BadSignature: `public` is a low-order point, which no honest client advertises.
    """
    try:
        return load_private(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise BadSignature("a peer advertised a key of low order") from error


def agree(private: PrivateKey, public: bytes, *, purpose: str, context: bytes) -> bytes:
    """Derives the 32-byte key that two clients share, for one purpose and context.

    Raises:
        BadSignature: as `exchange`.
    """
    return derive_key(exchange(private, public), purpose=purpose, context=context)
