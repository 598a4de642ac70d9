"""Masks: keystreams that are added to a vector on one side and cancel on the other.

y_u = x_u + PRG(b_u) + sum over v > u of PRG(s_uv) - sum over v < u of PRG(s_uv)   (mod 2^b)
(Bonawitz et al. 2017, ePrint 2017/281, section 4.0.2; here `u < v` compares roster indices).

Arithmetic is modulo 2^32 in uint32. As 2^b divides 2^32, packing the low b bits reduces it to Z_{2^b}.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protocol.secagg.key_agreement import agree
from protocol.secagg.prg import Keystream, derive_key

SLICE_WORDS = 65_536
"""Elements masked at a time: 256 KiB stays in a small core's cache."""


@dataclass(frozen=True)
class Mask:
    """One keystream and its sign."""

    key: bytes
    negative: bool

    def inverse(self) -> Mask:
        """The mask that cancels this one."""
        return Mask(self.key, not self.negative)


def self_mask(seed: bytes, roster_hash: bytes, index: int) -> Mask:
    """The mask that only the client at `index` knows, from its self-mask seed of 32 bytes."""
    return Mask(derive_key(seed, purpose="self-mask", context=_context(roster_hash, index, index)), False)


def seed_commitment(seed: bytes, roster_hash: bytes, index: int) -> bytes:
    """Commits to a self-mask seed, so that the aggregator can tell a recovered seed from garbage.

    Guarantee: hiding, as the seed has 256 bits of entropy, and binding (SHA-256 inside HKDF).
    """
    context = _context(roster_hash, index, index)
    return hashlib.sha256(derive_key(seed, purpose="seed-commitment", context=context)).digest()


def pairwise_mask(private: bytes, public: bytes, roster_hash: bytes, own: int, peer: int) -> Mask:
    """The mask that the client at `own` adds for its neighbour at `peer`, and the peer subtracts."""
    context = _context(roster_hash, min(own, peer), max(own, peer))
    return Mask(agree(private, public, purpose="pairwise-mask", context=context), own > peer)


def _context(roster_hash: bytes, low: int, high: int) -> bytes:
    return roster_hash + low.to_bytes(4, "big") + high.to_bytes(4, "big")


def apply_masks(vector: NDArray[np.uint32], masks: Iterable[Mask], start: int = 0) -> None:
    """Adds elements `start` to `start + len(vector)` of every mask to `vector`, in place, modulo 2^32.

    Args:
        vector: uint32, shape (m,): a slice of the whole vector.
        masks: what to add.
        start: where the slice begins in the whole vector.
    """
    streams = [(Keystream(mask.key), np.subtract if mask.negative else np.add) for mask in masks]
    for begin in range(0, len(vector), SLICE_WORDS):
        part = vector[begin : begin + SLICE_WORDS]
        for stream, operation in streams:
            operation(part, stream.words(start + begin, len(part)), out=part)


def masked_slices(
    vector: NDArray[np.uint32], masks: tuple[Mask, ...]
) -> Iterator[tuple[int, NDArray[np.uint32]]]:
    """Yields (start, masked slice) over `vector`, which stays as it is; nothing of full length is copied."""
    for start in range(0, len(vector), SLICE_WORDS):
        part = vector[start : start + SLICE_WORDS].copy()
        apply_masks(part, masks, start)
        yield start, part
