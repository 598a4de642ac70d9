"""Packing round-trips and refuses every truncation; sums below the bound lift exactly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import ring

BITS = st.integers(ring.MIN_BITS, ring.MAX_BITS)


@st.composite
def ring_vectors(draw: st.DrawFn) -> tuple[ring.RingVector, int]:
    bits = draw(BITS)
    elements = draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))
    return np.array(elements, dtype=np.uint32), bits


@given(ring_vectors())
def test_packing_is_the_little_endian_bit_string(case: tuple[ring.RingVector, int]) -> None:
    values, bits = case
    number = sum(int(value) << (bits * index) for index, value in enumerate(values))
    packed = ring.pack(values, bits)
    assert packed == number.to_bytes(ring.packed_size(values.size, bits), "little")
    np.testing.assert_array_equal(ring.unpack(packed, values.size, bits), values)


@given(ring_vectors(), st.data())
def test_every_truncation_and_extension_is_refused(
    case: tuple[ring.RingVector, int], data: st.DataObject
) -> None:
    values, bits = case
    packed = ring.pack(values, bits)
    for length in range(len(packed)):
        with pytest.raises(ring.PackedLengthError):
            ring.unpack(packed[:length], values.size, bits)
    extra = data.draw(st.binary(min_size=1, max_size=8))
    with pytest.raises(ring.PackedLengthError):
        ring.unpack(packed + extra, values.size, bits)


@given(ring_vectors())
def test_every_set_padding_bit_is_refused(case: tuple[ring.RingVector, int]) -> None:
    values, bits = case
    packed = bytearray(ring.pack(values, bits))
    for bit in range(values.size * bits, 8 * len(packed)):
        corrupt = bytearray(packed)
        corrupt[bit // 8] |= 1 << (bit % 8)
        with pytest.raises(ring.PaddingError):
            ring.unpack(corrupt, values.size, bits)


@given(ring_vectors(), st.data())
def test_slices_at_group_boundaries_pack_independently(
    case: tuple[ring.RingVector, int], data: st.DataObject
) -> None:
    values, bits = case
    cut = ring.GROUP * data.draw(st.integers(0, values.size // ring.GROUP))
    assert ring.pack(values[:cut], bits) + ring.pack(values[cut:], bits) == ring.pack(values, bits)


@given(BITS, st.data())
def test_sums_within_the_bound_lift_to_the_integer_sum(bits: int, data: st.DataObject) -> None:
    clients = data.draw(st.integers(1, min(20, 2 ** (bits - 1) - 1)))
    magnitude = (2 ** (bits - 1) - 1) // clients
    assert ring.cannot_overflow(clients, magnitude, bits)
    assert not ring.cannot_overflow(clients, (2 ** (bits - 1) - 1) // clients + 1, bits)
    element = st.one_of(st.integers(-magnitude, magnitude), st.sampled_from([-magnitude, magnitude]))
    rows = data.draw(st.lists(st.lists(element, min_size=3, max_size=3), min_size=clients, max_size=clients))
    integers = np.array(rows, dtype=np.int64)
    total = np.zeros(3, np.uint32)
    for row in integers:
        total = ring.add(total, ring.reduce(row, bits), bits)
    np.testing.assert_array_equal(ring.centred(total, bits), integers.sum(axis=0))


@given(ring_vectors(), st.data())
@settings(max_examples=50)
def test_subtraction_undoes_addition(case: tuple[ring.RingVector, int], data: st.DataObject) -> None:
    values, bits = case
    mask = np.array(
        data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=values.size, max_size=values.size)),
        dtype=np.uint32,
    )
    masked = ring.add(values, mask, bits)
    ring.check_vector(masked, bits)
    np.testing.assert_array_equal(ring.subtract(masked, mask, bits), values)
    in_place = values.copy()
    assert ring.add(in_place, mask, bits, out=in_place) is in_place
    np.testing.assert_array_equal(in_place, masked)


@given(ring_vectors())
def test_the_centred_lift_is_an_inverse_of_reduction(case: tuple[ring.RingVector, int]) -> None:
    values, bits = case
    lifted = ring.centred(values, bits)
    assert np.all(lifted >= -(2 ** (bits - 1)))
    assert np.all(lifted < 2 ** (bits - 1))
    np.testing.assert_array_equal(ring.reduce(lifted, bits), values)
