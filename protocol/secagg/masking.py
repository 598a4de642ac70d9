"""Masks: keystreams that are added to a vector on one side and cancel on the other.

y_u = x_u + PRG(b_u) + sum over v > u of PRG(s_uv) - sum over v < u of PRG(s_uv)   (mod 2^b)
(Bonawitz et al. 2017, ePrint 2017/281, section 4.0.2; here `u < v` compares roster indices).

Arithmetic is modulo 2^32 in uint32. As 2^b divides 2^32, packing the low b bits reduces it to Z_{2^b}.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from protocol.secagg.key_agreement import PrivateKey, agree
from protocol.secagg.prg import KEY_BYTES, SLICE_WORDS, Keystream, KeystreamReader, derive_key

if TYPE_CHECKING:
    from concurrent.futures import Executor

PARALLEL_WORDS = 2**28
"""Keystream words from which `remove_masks` uses its pool: about 0.3 s of one core's work.

Below it, moving the vector between processes was measured to cost more than it saved, in time and in memory.
"""


@dataclass(frozen=True, slots=True)
class Mask:
    """One keystream and its sign."""

    key: bytes = field(repr=False)
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


def pairwise_mask(private: PrivateKey, public: bytes, roster_hash: bytes, own: int, peer: int) -> Mask:
    """The mask that the client at `own` adds for its neighbour at `peer`, and the peer subtracts."""
    context = _context(roster_hash, min(own, peer), max(own, peer))
    return Mask(agree(private, public, purpose="pairwise-mask", context=context), own > peer)


def _context(roster_hash: bytes, low: int, high: int) -> bytes:
    return roster_hash + low.to_bytes(4, "big") + high.to_bytes(4, "big")


def apply_masks(vector: NDArray[np.uint32], masks: Iterable[Mask], start: int = 0) -> None:
    """Adds elements `start` to `start + len(vector)` of every mask to `vector`, in place, modulo 2^32.

    Any number of masks takes one buffer of a slice: masks may be a generator of millions.

    Args:
        vector: uint32, shape (m,): a slice of the whole vector.
        masks: what to add.
        start: where the slice begins in the whole vector.
    """
    parts = [vector[begin : begin + SLICE_WORDS] for begin in range(0, len(vector), SLICE_WORDS)]
    buffer = _Buffer(min(len(vector), SLICE_WORDS))
    for mask in masks:
        reader = Keystream(mask.key).reader(start, len(vector))
        for part in parts:
            buffer.add(part, reader, mask)


def masked_slices(
    vector: NDArray[np.uint32], masks: tuple[Mask, ...]
) -> Iterator[tuple[int, NDArray[np.uint32]]]:
    """Yields (start, masked slice) over `vector`, which stays as it is; nothing of full length is copied."""
    buffer = _Buffer(min(len(vector), SLICE_WORDS))
    readers = [(Keystream(mask.key).reader(0, len(vector)), mask) for mask in masks]
    for start in range(0, len(vector), SLICE_WORDS):
        part = vector[start : start + SLICE_WORDS].copy()
        for reader, mask in readers:
            buffer.add(part, reader, mask)
        yield start, part


class _Buffer:
    """Room for one slice of keystream, used again for each."""

    def __init__(self, words: int) -> None:
        self._bytes = memoryview(bytearray(4 * words))
        self._words = np.frombuffer(self._bytes, "<u4")

    def add(self, part: NDArray[np.uint32], reader: KeystreamReader, mask: Mask) -> None:
        """Adds the next words of a mask to `part`, at most a slice, in place."""
        count = len(part)
        reader.fill(self._bytes[: 4 * count])
        (np.subtract if mask.negative else np.add)(part, self._words[:count], out=part)


def remove_masks(
    vector: NDArray[np.uint32],
    masks: Sequence[Mask],
    pool: Callable[[], Executor] | None = None,
    workers: int = 1,
) -> None:
    """Does what `apply_masks(vector, masks)` does, with the same bits, on several cores.

    Each worker takes its own stretch of the vector through all masks, so the result cannot depend on who
    finishes first, and all of them together hold one more vector. A pool of processes is what helps: drawing
    a keystream holds the interpreter's lock, so threads take turns (measured: two threads, no gain).

    Args:
        vector: uint32, shape (m,): the whole vector; it becomes the result.
        masks: what to add.
        pool: gives the executor where the workers run, which sees the masks; called if they are worth it.
        workers: stretches to cut the vector into.

    Raises:
        BrokenExecutor: the pool took no work; nothing changed. A worker that dies later is stood in for.
    """
    if pool is None or workers <= 1 or len(vector) * len(masks) < PARALLEL_WORDS:
        apply_masks(vector, masks)
        return
    keys = b"".join(mask.key for mask in masks)
    signs = bytes(mask.negative for mask in masks)
    # Whole slices, so that no worker draws a short one in the middle.
    length = -(-len(vector) // (workers * SLICE_WORDS)) * SLICE_WORDS
    executor, starts = pool(), range(0, len(vector), length)
    tasks = [
        executor.submit(_stretch, vector[start : start + length], keys, signs, start) for start in starts
    ]
    for start, task in zip(starts, tasks, strict=True):
        part = vector[start : start + length]
        try:
            part[:] = task.result()
        except BrokenExecutor:
            apply_masks(part, masks, start)


def _stretch(part: NDArray[np.uint32], keys: bytes, signs: bytes, start: int) -> NDArray[np.uint32]:
    """One worker's part of `remove_masks`, on its own copy: threads would share the caller's."""
    part = part.copy()
    masks = (
        Mask(keys[KEY_BYTES * i : KEY_BYTES * (i + 1)], bool(negative)) for i, negative in enumerate(signs)
    )
    apply_masks(part, masks, start)
    return part
