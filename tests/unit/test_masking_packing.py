"""The packer of slices against `protocol.ring`, whose bytes it makes and reads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import ring
from protocol.ring import PackedLengthError, PaddingError, RingWidthError
from protocol.secagg.packing import SliceAdder, SlicePacker, sum_words
from protocol.secagg.prg import SLICE_WORDS

COUNTS = (0, 1, 7, 8, 9, 1000, SLICE_WORDS - 3, SLICE_WORDS)


def zeros(count: int, bits: int) -> np.ndarray:
    return np.zeros(sum_words(count, bits), np.uint64)


def read(total: np.ndarray, bits: int, count: int) -> np.ndarray:
    return ring.unpack(total.tobytes()[: ring.packed_size(count, bits)], count, bits)


def words(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + count).integers(0, 2**32, count, dtype=np.uint32)


@pytest.mark.parametrize("bits", range(8, 33))
def test_the_bytes_and_the_sums_are_those_of_the_ring(bits: int) -> None:
    packer, adder = SlicePacker(bits), SliceAdder(bits)
    mask = np.uint32(ring.modulus_mask(bits))
    # Largest first as well: what a longer slice leaves in the temporaries must not show.
    for count in (*COUNTS, *reversed(COUNTS)):
        values, before = words(count), words(count, seed=1)
        kept = values.copy()
        packed = packer.pack(values)
        assert packed == ring.pack(values & mask, bits)
        np.testing.assert_array_equal(values, kept)
        unpacked = before.copy()
        packer.unpack(packed, unpacked)
        np.testing.assert_array_equal(unpacked, values & mask)
        total = zeros(count, bits)
        for summand in (before, values, before):
            adder.add(total, packer.pack(summand), count)
        np.testing.assert_array_equal(read(total, bits, count), (values + before + before) & mask)


@pytest.mark.parametrize("bits", range(8, 33))
def test_many_sums_of_the_largest_elements_do_not_reach_their_neighbours(bits: int) -> None:
    adder, count = SliceAdder(bits, 99), 99
    mask, total = ring.modulus_mask(bits), zeros(count, bits)
    packed = ring.pack(np.full(count, mask, np.uint32), bits)
    for _ in range(300):
        adder.add(total, packed, count)
    np.testing.assert_array_equal(read(total, bits, count), np.full(count, 300 * mask & mask))
    assert not total.view(np.uint8)[len(packed) :].any()


@given(st.integers(8, 32), st.lists(st.integers(0, 2**32 - 1), max_size=40))
def test_any_values_survive(bits: int, numbers: list[int]) -> None:
    values = np.array(numbers, np.uint32)
    packer, total = SlicePacker(bits, 40), zeros(len(values), bits)
    for _ in range(3):
        SliceAdder(bits, 40).add(total, memoryview(packer.pack(values)), len(values))
    wanted = 3 * values & np.uint32(ring.modulus_mask(bits))
    np.testing.assert_array_equal(read(total, bits, len(values)), wanted)


@pytest.mark.parametrize("bits", [8, 20, 31, 32])
def test_wrong_bytes_are_refused_and_nothing_is_added(bits: int) -> None:
    adder, packer, total, values = SliceAdder(bits), SlicePacker(bits), zeros(9, bits), np.zeros(9, np.uint32)
    packed = packer.pack(words(9))
    for wrong in (packed[:-1], packed + b"\x00", b""):
        with pytest.raises(PackedLengthError):
            adder.add(total, wrong, 9)
        with pytest.raises(PackedLengthError):
            packer.unpack(wrong, values)
    if bits % 8:
        padded = packed[:-1] + bytes([packed[-1] | 0x80])
        with pytest.raises(PaddingError):
            adder.add(total, padded, 9)
        with pytest.raises(PaddingError):
            packer.unpack(padded, values)
    with pytest.raises(PackedLengthError):
        adder.add(zeros(99, bits), packed, 9)
    assert not total.any()
    assert not values.any()


@pytest.mark.parametrize("bits", [7, 33])
def test_a_width_that_is_no_ring_is_refused(bits: int) -> None:
    for kind in (SlicePacker, SliceAdder):
        with pytest.raises(RingWidthError):
            kind(bits)
