"""How the samplers use tables and keystreams; the distributions themselves meet an oracle elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest

from protocol.dp.errors import InvalidParameters
from protocol.dp.sampling import (
    discrete_gaussian_distance,
    discrete_gaussian_sampler,
    skellam_distance,
    skellam_sampler,
)
from protocol.secagg.prg import Keystream, derive_key

SAMPLERS = {"skellam": skellam_sampler, "discrete_gaussian": discrete_gaussian_sampler}


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_draw_equals_a_search_with_all_128_bits(name: str) -> None:
    sampler = SAMPLERS[name](5000.0)
    table = sampler.thresholds()
    key = b"\x07" * 32
    got = sampler.sample(key, 0, 3000)
    words = Keystream(derive_key(key, purpose="dp/noise/words")).words(0, 3000)
    rests = Keystream(derive_key(key, purpose="dp/noise/rests")).read(0, 12 * 3000)
    for index in range(3000):
        draw = (int(words[index]) << 96) | int.from_bytes(rests[12 * index : 12 * index + 12], "big")
        assert got[index] == sampler.low + sum(threshold <= draw for threshold in table)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_ties_in_the_first_word_are_decided_by_the_other_bits(name: str) -> None:
    sampler = SAMPLERS[name](40.0)
    table = sampler.thresholds()
    tops = sorted({threshold >> 96 for threshold in table} | {0, 2**32 - 1})
    words = np.array(tops, np.uint32)
    limits = [threshold & (2**96 - 1) for threshold in table]
    for rest in {0, 2**96 - 1, *limits[::7], *(max(limit - 1, 0) for limit in limits[::7])}:
        got = sampler._resolve(words, lambda index, rest=rest: rest)
        for value, word in zip(got, tops, strict=True):
            assert value == sampler.low + sum(threshold <= (word << 96) + rest for threshold in table)


def test_any_slice_can_be_drawn_by_itself() -> None:
    sampler = skellam_sampler(900.0)
    whole = sampler.sample(b"k" * 32, 0, 50_000)
    for start, count in [(0, 1), (1, 16_384), (16_384, 20_000), (49_999, 1), (123, 0)]:
        np.testing.assert_array_equal(sampler.sample(b"k" * 32, start, count), whole[start : start + count])
    assert np.any(sampler.sample(b"K" * 32, 0, 100) != whole[:100])


@pytest.mark.parametrize("variance", [0.0, -1.0, math.nan, math.inf, 2.0**33])
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_variances_without_a_table_are_refused(name: str, variance: float) -> None:
    with pytest.raises(InvalidParameters):
        SAMPLERS[name](variance)


def test_frozen_samples() -> None:
    """A change here means that one key gives other noise: transcripts no longer replay."""
    skellam = skellam_sampler(1.0).sample(bytes(32), 0, 24).tolist()
    assert skellam == [1, 1, 0, 2, 1, -1, -1, 1, 0, 0, -2, 0, -1, -1, -1, -1, 1, 1, -1, -1, -2, 0, 1, -2]
    gaussian = discrete_gaussian_sampler(1.0).sample(bytes(32), 0, 24).tolist()
    assert gaussian == [1, 1, 0, 2, 1, -1, -1, 1, 0, 0, -2, 0, -1, -1, -1, -1, 1, 1, -1, -1, -2, 0, 1, -2]


@pytest.mark.parametrize("variance", [1e-6, 0.05, 1.0, 900.0, 1e7])
def test_the_distance_is_known_without_a_table(variance: float) -> None:
    assert skellam_sampler(variance).distance == skellam_distance(variance)
    assert discrete_gaussian_sampler(variance).distance <= discrete_gaussian_distance(variance) < 2**-100
