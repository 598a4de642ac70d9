"""The randomised Hadamard transform, in place and in power-of-two blocks, so that no vector is padded.

A clipped update may hold its whole norm in a few coordinates, which would force a coarse scale on the ring.
The rotation x -> H D x / sqrt(B), with D random signs and H the Hadamard matrix of order B, spreads it
(Kairouz, Liu, Steinke 2021, arXiv 2102.06387, section 4.2). Here B is the largest power of two that fits; a
vector that is no multiple of B ends with one block that overlaps its predecessor. A product of orthogonal
maps is orthogonal, so norms are kept and the inverse undoes the blocks in reverse order.

Why overlapping costs nothing: the signs of each block are independent of everything before it, so every
coordinate of the result is, given the input of the last block that touched it, a sum of B terms
+-x_i / sqrt(B) with fresh signs and sum of x_i^2 <= |x|^2. By Hoeffding's lemma it is sub-Gaussian with
variance proxy |x|^2 / B (`variance_proxy`).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from protocol.secagg.prg import Keystream, derive_key

MAX_BLOCK = 1 << 20


def block_size(length: int) -> int:
    """Returns B for a vector of `length` elements: the largest power of two up to it, at most 2^20."""
    if length < 1:
        raise ValueError("an empty vector has no rotation")
    return min(MAX_BLOCK, 1 << (length.bit_length() - 1))


def variance_proxy(length: int) -> float:
    """Returns the sub-Gaussian variance proxy of a rotated coordinate over the squared norm: 1 / B."""
    return 1.0 / block_size(length)


def rotate(vector: NDArray[np.float32], seed: bytes) -> None:
    """Rotates `vector` in place.

    Args:
        vector: float32, shape (n,), contiguous. Two blocks (at most 8 MiB) are needed while it runs.
        seed: public, at least 16 bytes, the same for the whole cohort.
    """
    block = block_size(vector.size)
    stream = Keystream(derive_key(seed, purpose="dp/rotation"))
    scratch = np.empty(block, np.float32)
    for index, start in enumerate(_starts(vector.size, block)):
        part = vector[start : start + block]
        part *= _scaled_signs(stream, index, block)
        _hadamard(part, scratch)


def unrotate(vector: NDArray[np.float32], seed: bytes) -> None:
    """Undoes `rotate` in place, up to float32 rounding; same arguments."""
    block = block_size(vector.size)
    stream = Keystream(derive_key(seed, purpose="dp/rotation"))
    scratch = np.empty(block, np.float32)
    for index, start in reversed(list(enumerate(_starts(vector.size, block)))):
        part = vector[start : start + block]
        _hadamard(part, scratch)
        part *= _scaled_signs(stream, index, block)


def _starts(length: int, block: int) -> list[int]:
    """Where the blocks begin; the last one overlaps when `length` is no multiple of `block`."""
    starts = list(range(0, length - block + 1, block))
    if starts[-1] + block < length:
        starts.append(length - block)
    return starts


def _scaled_signs(stream: Keystream, index: int, block: int) -> NDArray[np.float32]:
    """The diagonal of D / sqrt(B) for one block, float32, shape (block,): one keystream bit a sign."""
    size = max(1, block // 8)
    bits = np.unpackbits(np.frombuffer(stream.read(index * size, size), np.uint8), count=block)
    magnitude = np.float32(1 / math.sqrt(block))
    return np.array([magnitude, -magnitude], np.float32)[bits]


def _hadamard(part: NDArray[np.float32], scratch: NDArray[np.float32]) -> None:
    """Replaces `part` by H @ part, unnormalised, H being Sylvester's matrix in natural order.

    Every level is the same butterfly of neighbours (Pease 1968, "An Adaptation of the Fast Fourier Transform
    for Parallel Processing"). Its order of additions is fixed, so that aggregator, auditor and any processor
    get the same bits; a product of matrices leaves that order to the linear algebra library and its threads.
    """
    source, target = part, scratch
    half = part.size // 2
    for _ in range(part.size.bit_length() - 1):
        even, odd = source[0::2], source[1::2]
        np.add(even, odd, out=target[:half])
        np.subtract(even, odd, out=target[half:])
        source, target = target, source
    if source is not part:
        part[:] = source
