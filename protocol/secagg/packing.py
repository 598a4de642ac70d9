"""Packs and adds ring vectors slice by slice, without allocating: `ring.pack` and `ring.unpack` in a loop.

The bytes are those of `protocol.ring`, which says what they mean. A slice a time in temporaries that stay
saves what fresh temporaries cost: at 10^6 elements their page faults took longer than the arithmetic.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from protocol import ring
from protocol.ring import GROUP, PackedLengthError, PaddingError
from protocol.secagg.prg import SLICE_WORDS

_LOW_WORD = np.uint64(2**32 - 1)


class SlicePacker:
    """Packs slices of one ring, and adds packed slices to a sum; one thread at a time.

    A group of 8 elements is `bits` bytes: four pairs of 2 * bits bits. Two neighbours in memory are one
    little-endian 64-bit word, so that shifts and masks make pairs of them, and the other way round, without
    touching an element alone.
    """

    def __init__(self, bits: int, longest: int = SLICE_WORDS) -> None:
        """Makes the temporaries, about 16 bytes an element of the longest slice.

        Args:
            bits: width of the ring.
            longest: elements of the longest slice; a device with a small model has no memory for more.

        Raises:
            RingWidthError: `bits` is outside [8, 32].
        """
        self._bits, self._mask = bits, ring.modulus_mask(bits)
        groups = -(-longest // GROUP)
        self._bytes = np.zeros(groups * bits + 8, np.uint8)  # a 64-bit read may reach 8 bytes further
        self._pairs = np.empty((groups, 4), np.uint64)
        self._lanes = np.empty(groups * 4, np.uint64)
        self._column = np.empty(groups, np.uint64)

    def pack(self, values: NDArray[np.uint32]) -> bytes:
        """Reduces a slice mod 2^bits and packs it: `ring.pack` of its low bits.

        Args:
            values: uint32, shape (m,), m at most `longest`; a multiple of 8, but for the last slice.
        """
        count, bits = len(values), self._bits
        groups = -(-count // GROUP)
        lanes = self._lanes[: 4 * groups]
        elements = lanes.view(np.uint32)
        np.bitwise_and(values, np.uint32(self._mask), out=elements[:count])
        elements[count:] = 0
        pairs = self._pairs[:groups]
        flat = pairs.reshape(-1)
        np.right_shift(lanes, np.uint64(32), out=flat)
        np.left_shift(flat, np.uint64(bits), out=flat)
        np.bitwise_and(lanes, _LOW_WORD, out=lanes)
        np.bitwise_or(flat, lanes, out=flat)
        words = lanes.reshape(groups, 4)
        spill = self._column[:groups]
        words[:, 0] = pairs[:, 0]
        filled = 1
        for index in range(1, 4):
            word, shift = divmod(2 * bits * index, 64)
            if word < filled:
                np.left_shift(pairs[:, index], np.uint64(shift), out=spill)
                np.bitwise_or(words[:, word], spill, out=words[:, word])
            else:
                np.left_shift(pairs[:, index], np.uint64(shift), out=words[:, word])
                filled = word + 1
            if shift + 2 * bits > 64:
                np.right_shift(pairs[:, index], np.uint64(64 - shift), out=words[:, word + 1])
                filled = word + 2
        rows = self._bytes[: groups * bits].reshape(groups, bits)
        rows[...] = words.view(np.uint8)[:, :bits]
        return self._bytes[: ring.packed_size(count, bits)].tobytes()

    def add(self, total: NDArray[np.uint32], packed: bytes | memoryview) -> None:
        """Adds a packed slice to `total`, in place, modulo 2^32: `total += ring.unpack(...)`.

        Args:
            total: uint32, shape (m,), m at most `longest`.
            packed: as many elements.

        Raises:
            PackedLengthError: `packed` is not exactly as long as the slice is; nothing was added.
            PaddingError: unused bits of the last byte are set; nothing was added.
        """
        count, bits = len(total), self._bits
        size = ring.packed_size(count, bits)
        if len(packed) != size:
            raise PackedLengthError(f"{count} elements of {bits} bits take {size} bytes, got {len(packed)}")
        if size and packed[-1] >> (8 - (8 * size - count * bits)):
            raise PaddingError("padding bits are not zero")
        if bits == 31:  # the one width whose pairs may straddle nine bytes
            np.add(total, ring.unpack(packed, count, bits), out=total)
            return
        groups = -(-count // GROUP)
        self._bytes[:size] = np.frombuffer(packed, np.uint8)
        self._bytes[size : groups * bits] = 0
        pairs = self._pairs[:groups]
        for index in range(4):
            byte, shift = divmod(2 * bits * index, 8)
            column: NDArray[np.uint64] = np.ndarray(
                (groups,), "<u8", self._bytes.data, offset=byte, strides=(bits,)
            )
            np.right_shift(column, np.uint64(shift), out=pairs[:, index])
        flat, lanes = pairs.reshape(-1), self._lanes[: 4 * groups]
        np.left_shift(flat, np.uint64(32 - bits), out=lanes)
        np.bitwise_and(lanes, np.uint64(self._mask << 32), out=lanes)
        np.bitwise_and(flat, np.uint64(self._mask), out=flat)
        np.bitwise_or(lanes, flat, out=lanes)
        np.add(total, lanes.view(np.uint32)[:count], out=total)
