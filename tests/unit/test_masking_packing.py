"""The packer of slices against `protocol.ring`, whose bytes it makes and reads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import ring
from protocol.ring import PackedLengthError, PaddingError, RingWidthError
from protocol.secagg.packing import SlicePacker
from protocol.secagg.prg import SLICE_WORDS

COUNTS = (0, 1, 7, 8, 9, 1000, SLICE_WORDS - 3, SLICE_WORDS)


def words(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + count).integers(0, 2**32, count, dtype=np.uint32)


@pytest.mark.parametrize("bits", range(8, 33))
def test_the_bytes_and_the_sums_are_those_of_the_ring(bits: int) -> None:
    packer = SlicePacker(bits)
    mask = np.uint32(ring.modulus_mask(bits))
    # Largest first as well: what a longer slice leaves in the temporaries must not show.
    for count in (*COUNTS, *reversed(COUNTS)):
        values, before = words(count), words(count, seed=1)
        kept = values.copy()
        packed = packer.pack(values)
        assert packed == ring.pack(values & mask, bits)
        np.testing.assert_array_equal(values, kept)
        total = before.copy()
        packer.add(total, packed)
        np.testing.assert_array_equal(total, before + (values & mask))


@given(st.integers(8, 32), st.lists(st.integers(0, 2**32 - 1), max_size=40))
def test_any_values_survive(bits: int, numbers: list[int]) -> None:
    values = np.array(numbers, np.uint32)
    packer, total = SlicePacker(bits), np.zeros(len(values), np.uint32)
    packer.add(total, memoryview(packer.pack(values)))
    np.testing.assert_array_equal(total, values & np.uint32(ring.modulus_mask(bits)))


@pytest.mark.parametrize("bits", [8, 20, 31, 32])
def test_wrong_bytes_are_refused_and_nothing_is_added(bits: int) -> None:
    packer, total = SlicePacker(bits), np.zeros(9, np.uint32)
    packed = packer.pack(words(9))
    for wrong in (packed[:-1], packed + b"\x00", b""):
        with pytest.raises(PackedLengthError):
            packer.add(total, wrong)
    if bits % 8:
        with pytest.raises(PaddingError):
            packer.add(total, packed[:-1] + bytes([packed[-1] | 0x80]))
    assert not total.any()


@pytest.mark.parametrize("bits", [7, 33])
def test_a_width_that_is_no_ring_is_refused(bits: int) -> None:
    with pytest.raises(RingWidthError):
        SlicePacker(bits)
