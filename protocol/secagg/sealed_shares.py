"""Sealing a pair of Shamir shares for one peer: ChaCha20-Poly1305 (RFC 8439) under an agreed key."""

from __future__ import annotations

from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from protocol.errors import BadSignature
from protocol.secagg.key_agreement import PrivateKey, exchange
from protocol.secagg.prg import derive_key
from protocol.secagg.shamir import SHARE_BYTES

# A key is fresh in every round and differs by direction, and it seals one message: the nonce can be constant.
_NONCE = bytes(12)


def _route(roster_hash: bytes, sender: int, receiver: int) -> bytes:
    return roster_hash + sender.to_bytes(4, "big") + receiver.to_bytes(4, "big")


@dataclass(frozen=True, slots=True)
class Channel:
    """The two keys between a client and one peer, from one key agreement, which is most of their cost.

    Attributes:
        sealing: for what the client sends.
        opening: for what the peer sends.
    """

    sealing: bytes = field(repr=False)
    opening: bytes = field(repr=False)


def channel(private: PrivateKey, public: bytes, roster_hash: bytes, own: int, peer: int) -> Channel:
    """Agrees on the keys between the clients at `own` and `peer`."""
    shared = exchange(private, public)
    return Channel(
        *(
            derive_key(shared, purpose="share-encryption", context=_route(roster_hash, *route))
            for route in ((own, peer), (peer, own))
        )
    )


def seal(key: bytes, roster_hash: bytes, sender: int, receiver: int, shares: tuple[bytes, bytes]) -> bytes:
    """Seals (key share, seed share) from `sender` for `receiver`; returns 82 bytes.

    Assumes: called once for a key, as the nonce is constant.
    """
    return ChaCha20Poly1305(key).encrypt(_NONCE, b"".join(shares), _route(roster_hash, sender, receiver))


def unseal(key: bytes, roster_hash: bytes, sender: int, receiver: int, sealed: bytes) -> tuple[bytes, bytes]:
    """Opens what `seal` made; returns (key share, seed share).

    Raises:
        BadSignature: it was not sealed by this sender for this receiver in this round.
    """
    try:
        plain = ChaCha20Poly1305(key).decrypt(_NONCE, sealed, _route(roster_hash, sender, receiver))
    except InvalidTag as error:
        raise BadSignature(f"the shares from client {sender} do not open") from error
    if len(plain) != 2 * SHARE_BYTES:
        raise BadSignature(f"the shares from client {sender} have a wrong length")
    return plain[:SHARE_BYTES], plain[SHARE_BYTES:]
