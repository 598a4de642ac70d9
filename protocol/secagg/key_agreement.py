"""X25519 key agreement (RFC 7748) on raw 32-byte keys, and what Covey derives from it."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from protocol.errors import BadSignature
from protocol.secagg.prg import derive_key

PrivateKey = bytes | X25519PrivateKey
"""32 raw bytes, or what `load_private` made of them."""


def load_private(private: PrivateKey) -> X25519PrivateKey:
    """Prepares a private key of 32 bytes for many agreements: that costs as much as an agreement itself."""
    return private if isinstance(private, X25519PrivateKey) else X25519PrivateKey.from_private_bytes(private)


def public_key(private: PrivateKey) -> bytes:
    """Returns the public key, 32 bytes, of a private key."""
    return load_private(private).public_key().public_bytes_raw()


def agree(private: PrivateKey, public: bytes, *, purpose: str, context: bytes) -> bytes:
    """Derives the 32-byte key that two clients share, for one purpose and context.

    Raises:
        BadSignature: `public` is a low-order point, which no honest client advertises.
    """
    try:
        shared = load_private(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise BadSignature("a peer advertised a key of low order") from error
    return derive_key(shared, purpose=purpose, context=context)
