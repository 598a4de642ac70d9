"""What the ring refuses, and vectors that another implementation can be checked against."""

from __future__ import annotations

import numpy as np
import pytest

from protocol import ring


@pytest.mark.parametrize("bits", [-1, 0, 7, 33, 64])
def test_a_width_outside_the_range_is_refused(bits: int) -> None:
    with pytest.raises(ring.RingWidthError):
        ring.pack(np.zeros(3, np.uint32), bits)
    with pytest.raises(ring.RingWidthError):
        ring.unpack(b"", 0, bits)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(3, np.int32),
        np.zeros(3, np.uint64),
        np.zeros(3, np.float32),
        np.zeros((3, 1), np.uint32),
        np.array([0, 2**12], np.uint32),
        np.array([2**32 - 1], np.uint32),
    ],
)
def test_an_array_that_is_no_ring_vector_is_refused(values: ring.RingVector) -> None:
    with pytest.raises(ring.RingElementError):
        ring.pack(values, 12)


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ring.PackedLengthError):
        ring.unpack(b"", -1, 8)


@pytest.mark.parametrize(
    ("bits", "values", "packed"),
    [
        (8, [0x01, 0xFF], "01ff"),
        (12, [0xABC, 0x123], "bc3a12"),
        (12, [0xABC], "bc0a"),
        (20, [0xFFFFF, 0, 1], "ffff0f0000010000"),
        (9, [0x1FF] * 9, "ff" * 10 + "01"),
        (32, [0xDEADBEEF, 1], "efbeadde01000000"),
    ],
)
def test_frozen_packings(bits: int, values: list[int], packed: str) -> None:
    vector = np.array(values, np.uint32)
    assert ring.pack(vector, bits).hex() == packed
    np.testing.assert_array_equal(ring.unpack(bytes.fromhex(packed), len(values), bits), vector)


@pytest.mark.parametrize("bits", [8, 13, 20, 32])
def test_long_vectors_round_trip_across_slabs(bits: int) -> None:
    count = 3 * 8192 * ring.GROUP + 5
    values = (np.arange(count, dtype=np.uint64) * 2654435761 % 2**bits).astype(np.uint32)
    np.testing.assert_array_equal(ring.unpack(ring.pack(values, bits), count, bits), values)


def test_one_more_client_than_the_bound_allows_does_overflow() -> None:
    bits, magnitude = 8, 127
    assert ring.cannot_overflow(1, magnitude, bits)
    assert not ring.cannot_overflow(2, magnitude, bits)
    residue = ring.reduce(np.array([magnitude], np.int64), bits)
    assert ring.centred(ring.add(residue, residue, bits), bits)[0] == 254 - 256
