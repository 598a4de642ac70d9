"""Packs ring vectors, and adds packed ones to a packed sum, slice by slice; the bytes are `protocol.ring`'s.

A slice a time in temporaries that stay saves what fresh ones cost: at 10^6 elements their page faults took
longer than the arithmetic. What is left is the number of passes over a slice, and how each walks through
memory.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from protocol import ring
from protocol.ring import GROUP, PackedLengthError, PaddingError
from protocol.secagg.prg import SLICE_WORDS


class SlicePacker:
    """Packs slices of one ring; one thread at a time.

    A group of 8 elements is `bits` bytes. They move through columns, one word of every group in each, since
    NumPy is fast along contiguous arrays only.
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
        self._bytes = np.zeros(groups * bits + 8, np.uint8)  # a 64-bit word may reach 8 bytes further
        self._pairs = np.empty(4 * groups, np.uint64)
        self._lanes = np.empty(4 * groups, np.uint64)
        self._words = np.empty((4, groups), np.uint64)
        self._column = np.empty(groups, np.uint64)

    def pack(self, values: NDArray[np.uint32]) -> bytes:
        """Reduces a slice mod 2^bits and packs it: `ring.pack` of its low bits.

        Args:
            values: uint32, shape (m,), m at most `longest`; a multiple of 8, but for the last slice.
        """
        count, bits = len(values), self._bits
        groups = -(-count // GROUP)
        pairs, lanes = self._pairs[: 4 * groups], self._lanes[: 4 * groups]
        self._pair(values, pairs, lanes)
        # The four pairs of a group become the words of its bytes, each a column.
        columns = lanes.reshape(4, groups)
        columns[...] = pairs.reshape(groups, 4).T
        words, spill, filled = self._words[:, :groups], self._column[:groups], 0
        for index, column in enumerate(columns):
            word, shift = divmod(2 * bits * index, 64)
            if word < filled:
                np.left_shift(column, np.uint64(shift), out=spill)
                np.bitwise_or(words[word], spill, out=words[word])
            else:
                np.left_shift(column, np.uint64(shift), out=words[word])
                filled = word + 1
            if shift + 2 * bits > 64:
                np.right_shift(column, np.uint64(64 - shift), out=words[word + 1])
                filled = word + 2
        # Last word first: it reaches into the next group, whose first word is written after it.
        for word in reversed(range(filled)):
            column = np.ndarray((groups,), "<u8", self._bytes.data, offset=8 * word, strides=(bits,))
            column[...] = words[word]
        return self._bytes[: ring.packed_size(count, bits)].tobytes()

    def _pair(self, values: NDArray[np.uint32], pairs: NDArray[np.uint64], spare: NDArray[np.uint64]) -> None:
        """Makes 2 * bits bits of each two neighbours, which are one little-endian 64-bit word in memory."""
        count = len(values)
        if count % GROUP or not values.flags.c_contiguous:
            padded = pairs.view(np.uint32)
            padded[:count] = values
            padded[count:] = 0
            values = padded
        neighbours = values.view(np.uint64)
        np.right_shift(neighbours, np.uint64(32 - self._bits), out=spare)
        np.bitwise_and(spare, np.uint64(self._mask << self._bits), out=spare)
        np.bitwise_and(neighbours, np.uint64(self._mask), out=pairs)
        np.bitwise_or(pairs, spare, out=pairs)

    def unpack(self, packed: bytes | memoryview, values: NDArray[np.uint32]) -> None:
        """Reads a packed slice: `ring.unpack` into `values`.

        Args:
            packed: of as many elements as `values` has.
            values: uint32, shape (m,), m at most `longest`.

        Raises:
            PackedLengthError, PaddingError: as `ring.unpack`; nothing was written.
        """
        count, bits = len(values), self._bits
        _check(packed, count, bits)
        if bits == 31 or count % GROUP:  # pairs of 62 bits may straddle nine bytes
            values[:] = ring.unpack(packed, count, bits)
            return
        groups = count // GROUP
        self._bytes[: len(packed)] = np.frombuffer(packed, np.uint8)
        pairs = self._pairs[: 4 * groups]
        columns = pairs.reshape(groups, 4)
        for index in range(4):
            byte, shift = divmod(2 * bits * index, 8)
            column: NDArray[np.uint64] = np.ndarray(
                (groups,), "<u8", self._bytes.data, offset=byte, strides=(bits,)
            )
            np.right_shift(column, np.uint64(shift), out=columns[:, index])
        neighbours = values.view(np.uint64)
        np.left_shift(pairs, np.uint64(32 - bits), out=neighbours)
        np.bitwise_and(neighbours, np.uint64(self._mask << 32), out=neighbours)
        np.bitwise_and(pairs, np.uint64(self._mask), out=pairs)
        np.bitwise_or(neighbours, pairs, out=neighbours)


class SliceAdder:
    """Adds packed slices to a packed sum, without taking an element out; one thread at a time.

    A sum is the bits of `ring.pack`, filled up with zeros to 64-bit words. Words are added with the top bit
    of every element cleared, so that no element carries into the next one; a top bit is then what the three
    bits that meet there say. An element that spans two words carries from one to the other, which shows as a
    word that wrapped around.
    """

    def __init__(self, bits: int, longest: int = SLICE_WORDS) -> None:
        """Makes the temporaries, about five times a packed slice.

        Args:
            bits: width of the ring.
            longest: elements of the longest slice.

        Raises:
            RingWidthError: `bits` is outside [8, 32].
        """
        words = sum_words(longest, bits)
        marks = np.zeros(64 * words, np.uint8)
        marks[bits - 1 : longest * bits : bits] = 1
        self._bits = bits
        self._tops = np.packbits(marks, bitorder="little").view("<u8")
        self._rest = ~self._tops
        self._left, self._right = np.empty(words, np.uint64), np.empty(words, np.uint64)
        self._wrapped = np.empty(words, np.bool_)

    def add(self, total: NDArray[np.uint64], packed: bytes | memoryview, count: int) -> None:
        """Adds a packed slice to a sum, in place, modulo 2^bits.

        Args:
            total: uint64, shape (sum_words(count, bits),); a new sum is zeros.
            packed: as many elements.
            count: elements, at most `longest`.

        Raises:
            PackedLengthError: `packed` or `total` is not exactly as long as the slice is; nothing was added.
            PaddingError: unused bits of the last byte are set; nothing was added.
        """
        bits, words = self._bits, sum_words(count, self._bits)
        size = _check(packed, count, bits)
        if len(total) != words:
            raise PackedLengthError(f"the sum of {count} elements has {words} words, got {len(total)}")
        left, right, wrapped = self._left[:words], self._right[:words], self._wrapped[:words]
        tops, rest = self._tops[:words], self._rest[:words]
        if size % 8:
            packed = bytes(packed) + bytes(8 * words - size)
        summand = np.frombuffer(packed, "<u8")
        np.bitwise_and(summand, rest, out=left)
        np.bitwise_and(total, rest, out=right)
        np.bitwise_xor(total, summand, out=total)
        np.bitwise_and(total, tops, out=total)
        np.add(left, right, out=right)
        np.less(right, left, out=wrapped)
        np.add(right[1:], wrapped[:-1].view(np.uint8), out=right[1:])
        np.bitwise_xor(total, right, out=total)


def sum_words(count: int, bits: int) -> int:
    """64-bit words of a packed sum of `count` elements."""
    return -(-ring.packed_size(count, bits) // 8)


def _check(packed: bytes | memoryview, count: int, bits: int) -> int:
    size = ring.packed_size(count, bits)
    if len(packed) != size:
        raise PackedLengthError(f"{count} elements of {bits} bits take {size} bytes, got {len(packed)}")
    if size and packed[-1] >> (8 - (8 * size - count * bits)):
        raise PaddingError("padding bits are not zero")
    return size
