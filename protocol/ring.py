"""Vectors over the ring Z_{2^b}, 8 <= b <= 32: addition, the centred lift and bit packing.

A ring vector is a uint32 array, shape (n,), every element below 2^b. On the wire an element costs b bits.

When a sum cannot overflow. Let client i hold integers x_i with |x_i| <= M in every coordinate, encoded as
x_i mod 2^b, and let n clients be summed with n * M <= 2^(b-1) - 1 (`cannot_overflow`). Then S = sum of x_i
satisfies |S| <= n * M < 2^(b-1), and

    (sum of (x_i mod 2^b)) mod 2^b = S mod 2^b,

because reduction mod 2^b is a ring homomorphism. The centred lift maps a residue to its one representative
in [-2^(b-1), 2^(b-1)), and S lies in that interval, so the lift returns S itself: no sum of up to n such
vectors, in any order and with any masks that cancel mod 2^b, can differ from the sum over the integers.
Without the condition the lift returns S + j * 2^b for some integer j: utility is lost, privacy is not, since
reduction is post-processing of the sum.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from protocol.errors import ProtocolError

MIN_BITS = 8
MAX_BITS = 32
GROUP = 8
"""Elements that fill whole bytes at every width: chunks that start at multiples of it pack independently."""

_SLAB = 8192  # groups packed at once, so that the temporaries stay in the cache and never double a vector

RingVector = NDArray[np.uint32]


class RingError(ProtocolError, ValueError):
    """Ring elements or packed bytes that break the rules of this module."""


class RingWidthError(RingError):
    """A ring width outside [8, 32]."""


class RingElementError(RingError):
    """An array that is no ring vector: wrong type or shape, or an element of 2^b or more."""


class PackedLengthError(RingError):
    """Packed bytes whose length does not fit the announced number of elements."""


class PaddingError(RingError):
    """Packed bytes whose unused last bits are not zero."""


def modulus_mask(bits: int) -> int:
    """Returns 2^bits - 1.

    Raises:
        RingWidthError: `bits` is outside [8, 32].
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise RingWidthError(f"a ring has {MIN_BITS} to {MAX_BITS} bits, got {bits}")
    return (1 << bits) - 1


def check_vector(values: RingVector, bits: int) -> None:
    """Refuses anything but a uint32 vector of elements below 2^bits.

    Raises:
        RingWidthError: `bits` is outside [8, 32].
        RingElementError: wrong type, wrong shape or an element out of range.
    """
    mask = modulus_mask(bits)
    if values.dtype != np.uint32 or values.ndim != 1:
        raise RingElementError(f"a ring vector is uint32 of shape (n,), got {values.dtype} {values.shape}")
    if bits < MAX_BITS and values.size and int(values.max()) > mask:
        raise RingElementError(f"an element is not below 2^{bits}")


def reduce(integers: NDArray[np.int64], bits: int) -> RingVector:
    """Maps integers, int64 of any shape, to their residues mod 2^bits, uint32 of the same shape."""
    mask = modulus_mask(bits)
    return (integers & mask).astype(np.uint32)


def centred(values: RingVector, bits: int) -> NDArray[np.int64]:
    """Lifts residues to their representatives in [-2^(bits-1), 2^(bits-1)), int64 of the same shape."""
    half = (modulus_mask(bits) + 1) >> 1
    return ((values.astype(np.int64) + half) & (2 * half - 1)) - half


def add(left: RingVector, right: RingVector, bits: int, *, out: RingVector | None = None) -> RingVector:
    """Returns left + right mod 2^bits, uint32; `out` may be either operand."""
    total = np.add(left, right, out=out)  # wraps mod 2^32, of which 2^bits is a divisor
    return np.bitwise_and(total, np.uint32(modulus_mask(bits)), out=total)


def subtract(left: RingVector, right: RingVector, bits: int, *, out: RingVector | None = None) -> RingVector:
    """Returns left - right mod 2^bits, uint32; `out` may be either operand."""
    difference = np.subtract(left, right, out=out)
    return np.bitwise_and(difference, np.uint32(modulus_mask(bits)), out=difference)


def cannot_overflow(clients: int, magnitude: int, bits: int) -> bool:
    """Says whether every sum of `clients` vectors with elements in [-magnitude, magnitude] lifts exactly.

    The proof is in the module's docstring.
    """
    return clients * magnitude <= modulus_mask(bits) >> 1


def packed_size(count: int, bits: int) -> int:
    """Returns how many bytes `count` elements take."""
    modulus_mask(bits)
    if count < 0:
        raise PackedLengthError(f"a vector cannot have {count} elements")
    return (count * bits + 7) // 8


def pack(values: RingVector, bits: int) -> bytes:
    """Packs elements into a little-endian bit string: element i takes bits [i * bits, (i + 1) * bits).

    Slices whose length is a multiple of 8 may be packed one by one and concatenated.

    Args:
        values: ring vector, uint32, shape (n,).

    Raises:
        RingError: the vector is not one of this ring.
    """
    check_vector(values, bits)
    size = packed_size(values.size, bits)
    whole = values.size // GROUP
    packed = bytearray(whole * bits)
    target = np.frombuffer(packed, np.uint8).reshape(whole, bits)
    for start in range(0, whole, _SLAB):
        stop = min(start + _SLAB, whole)
        target[start:stop] = _pack_groups(values[GROUP * start : GROUP * stop], bits)
    del target  # releases the buffer, which the tail is appended to
    if values.size % GROUP:
        tail = np.zeros(GROUP, np.uint32)
        tail[: values.size % GROUP] = values[GROUP * whole :]
        packed += _pack_groups(tail, bits).tobytes()[: size - len(packed)]
    return bytes(packed)


def unpack(data: bytes | bytearray | memoryview, count: int, bits: int) -> RingVector:
    """Reads `count` elements back: the inverse of `pack`.

    Returns:
        uint32, shape (count,), every element below 2^bits.

    Raises:
        PackedLengthError: `data` is not exactly as long as `count` elements are.
        PaddingError: unused bits of the last byte are set, so that two strings would mean one vector.
    """
    size = packed_size(count, bits)
    if len(data) != size:
        raise PackedLengthError(f"{count} elements of {bits} bits take {size} bytes, got {len(data)}")
    if size and data[-1] >> (8 - (8 * size - count * bits)):
        raise PaddingError("padding bits are not zero")
    raw = np.frombuffer(data, np.uint8)
    whole = count // GROUP
    values = np.empty(count, np.uint32)
    for start in range(0, whole, _SLAB):
        stop = min(start + _SLAB, whole)
        _unpack_groups(raw[start * bits : stop * bits], bits, values[GROUP * start : GROUP * stop])
    if count % GROUP:
        tail = np.zeros(bits, np.uint8)
        tail[: size - whole * bits] = raw[whole * bits :]
        group = np.empty(GROUP, np.uint32)
        _unpack_groups(tail, bits, group)
        values[GROUP * whole :] = group[: count % GROUP]
    return values


# A group of 8 elements is `bits` bytes. Two neighbours first become one 64-bit pair of 2 * bits, and four
# such pairs are shifted into four 64-bit words, of which the first `bits` bytes are the packed group. Every
# step is one array operation over all groups.


def _pack_groups(values: RingVector, bits: int) -> NDArray[np.uint8]:
    """Packs a multiple of 8 elements; returns uint8, shape (groups, bits)."""
    pairs = values[1::2].astype(np.uint64)
    pairs <<= np.uint64(bits)
    pairs |= values[0::2]
    pairs = pairs.reshape(-1, 4)
    words = np.zeros((len(pairs), 4), "<u8")
    for index in range(4):
        word, shift = divmod(2 * bits * index, 64)
        words[:, word] |= pairs[:, index] << np.uint64(shift)
        if shift + 2 * bits > 64:
            words[:, word + 1] |= pairs[:, index] >> np.uint64(64 - shift)
    return words.view(np.uint8)[:, :bits]


def _unpack_groups(raw: NDArray[np.uint8], bits: int, out: RingVector) -> None:
    """Unpacks whole groups into `out`, uint32, shape (8 * groups,)."""
    groups = len(raw) // bits
    spread = np.zeros((groups, 32), np.uint8)
    spread[:, :bits] = raw.reshape(groups, bits)
    words = spread.view("<u8")
    pairs = np.empty((groups, 4), np.uint64)
    for index in range(4):
        word, shift = divmod(2 * bits * index, 64)
        np.right_shift(words[:, word], np.uint64(shift), out=pairs[:, index])
        if shift + 2 * bits > 64:
            pairs[:, index] |= words[:, word + 1] << np.uint64(64 - shift)
    flat = pairs.reshape(-1)
    mask = np.uint64(modulus_mask(bits))
    out[0::2] = flat & mask
    out[1::2] = (flat >> np.uint64(bits)) & mask
