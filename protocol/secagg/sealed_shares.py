"""Sealing a pair of Shamir shares for one peer: ChaCha20-Poly1305 (RFC 8439) under an agreed key."""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from protocol.errors import BadSignature
from protocol.secagg.key_agreement import PrivateKey, agree
from protocol.secagg.shamir import SHARE_BYTES

# A key is fresh in every round and differs by direction, and it seals one message: the nonce can be constant.
_NONCE = bytes(12)


def _route(roster_hash: bytes, sender: int, receiver: int) -> bytes:
    return roster_hash + sender.to_bytes(4, "big") + receiver.to_bytes(4, "big")


def seal(
    private: PrivateKey,
    public: bytes,
    roster_hash: bytes,
    sender: int,
    receiver: int,
    shares: tuple[bytes, bytes],
) -> bytes:
    """Seals (key share, seed share) from `sender` for `receiver`; returns 82 bytes.

    Assumes: called once for a (round, sender, receiver), as the nonce is constant.
    """
    route = _route(roster_hash, sender, receiver)
    key = agree(private, public, purpose="share-encryption", context=route)
    return ChaCha20Poly1305(key).encrypt(_NONCE, b"".join(shares), route)


def unseal(
    private: PrivateKey, public: bytes, roster_hash: bytes, sender: int, receiver: int, sealed: bytes
) -> tuple[bytes, bytes]:
    """Opens what `seal` made; returns (key share, seed share).

    Raises:
        BadSignature: it was not sealed by this sender for this receiver in this round.
    """
    route = _route(roster_hash, sender, receiver)
    key = agree(private, public, purpose="share-encryption", context=route)
    try:
        plain = ChaCha20Poly1305(key).decrypt(_NONCE, sealed, route)
    except InvalidTag as error:
        raise BadSignature(f"the shares from client {sender} do not open") from error
    if len(plain) != 2 * SHARE_BYTES:
        raise BadSignature(f"the shares from client {sender} have a wrong length")
    return plain[:SHARE_BYTES], plain[SHARE_BYTES:]
