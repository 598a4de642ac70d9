"""Clipping, rotation and conditional rounding: frozen figures, moments and refusals."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest

from protocol.dp.clipping import clip, clip_factor, l2_norm
from protocol.dp.errors import InvalidParameters, NonFiniteUpdate, RoundingFailed
from protocol.dp.rotation import block_size, rotate, unrotate, variance_proxy
from protocol.dp.rounding import round_conditionally, rounded_norm_bound_squared

SEED = bytes(range(32))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_update_is_refused(bad: float) -> None:
    update = np.zeros(100_000, np.float32)
    update[99_999] = bad
    with pytest.raises(NonFiniteUpdate):
        clip(update, 1.0)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf])
def test_a_clip_norm_that_is_no_positive_number_is_refused(bound: float) -> None:
    with pytest.raises(InvalidParameters):
        clip_factor(1.0, bound)


def test_the_norm_of_huge_finite_values_does_not_overflow() -> None:
    update = np.full(70_000, np.finfo(np.float32).max, np.float32)
    assert l2_norm(update) == pytest.approx(float(np.finfo(np.float32).max) * math.sqrt(70_000))
    assert l2_norm(clip(update, 2.0)) == pytest.approx(2.0, rel=1e-6)


def test_a_zero_update_stays_zero() -> None:
    assert not clip(np.zeros(10, np.float32), 1.0).any()


@pytest.mark.parametrize("length", [1, 2, 3, 5, 64, 100, 127, 1000, 4096, 9098])
def test_the_rotation_is_the_hadamard_matrix_with_signs(length: int) -> None:
    """Against the definition: H_B[i, j] = (-1)^popcount(i & j), applied block by block."""
    rng = np.random.default_rng(length)
    vector = rng.standard_normal(length).astype(np.float32)
    rotated = vector.copy()
    rotate(rotated, SEED)
    back = rotated.copy()
    unrotate(back, SEED)
    np.testing.assert_allclose(back, vector, atol=1e-5)
    if length <= 1000:
        np.testing.assert_allclose(rotated, _dense_rotation(vector), atol=1e-5)


def test_the_rotation_has_the_same_bits_on_every_machine() -> None:
    """Frozen digests: aggregator, auditor, x86, ARM, one thread, many. A matrix product would differ."""
    vector = (np.arange(300_000, dtype=np.float32) % 1013 - 500) / np.float32(7)
    rotate(vector, SEED)
    assert hashlib.sha256(vector.tobytes()).hexdigest()[:16] == "e32f56b8190c034a"
    unrotate(vector, SEED)
    assert hashlib.sha256(vector.tobytes()).hexdigest()[:16] == "2b31506ae1a36b5f"


def _dense_rotation(vector: np.ndarray) -> np.ndarray:
    from protocol.secagg.prg import Keystream, derive_key

    block = block_size(vector.size)
    order = np.arange(block)
    parity = np.array([[bin(i & j).count("1") & 1 for j in order] for i in order])
    matrix = 1 - 2.0 * parity
    stream = Keystream(derive_key(SEED, purpose="dp/rotation"))
    result = vector.astype(np.float64)
    starts = list(range(0, vector.size - block + 1, block))
    if vector.size % block:
        starts.append(vector.size - block)
    size = max(1, block // 8)
    for index, start in enumerate(starts):
        bits = np.unpackbits(np.frombuffer(stream.read(index * size, size), np.uint8))[:block]
        signs = 1 - 2.0 * bits
        result[start : start + block] = matrix @ (signs * result[start : start + block]) / math.sqrt(block)
    return result


@pytest.mark.parametrize("length", [4096, 5000, 9098])
def test_a_concentrated_vector_is_spread_as_the_variance_proxy_says(length: int) -> None:
    """Hoeffding: P(any |y_j| > t) <= 2 n exp(-t^2 / 2 proxy); the threshold makes that 10^-6."""
    limit = math.sqrt(2 * variance_proxy(length) * math.log(2 * length / 1e-6))
    for position in (0, 1, length // 2, length - 1):
        vector = np.zeros(length, np.float32)
        vector[position] = 1
        rotate(vector, SEED)
        assert np.abs(vector).max() <= limit
        assert l2_norm(vector) == pytest.approx(1, rel=1e-5)


def test_blocks_are_the_largest_powers_of_two_and_capped() -> None:
    assert [block_size(n) for n in (1, 2, 3, 4, 9098, 2**20, 2**20 + 1, 10**8)] == [
        1, 2, 2, 4, 8192, 2**20, 2**20, 2**20,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="empty"):
        block_size(0)


def test_the_norm_bound_reproduces_the_parameters_of_tff() -> None:
    """TFF's ddp_secure_aggregator at z = 1, n = 100, 16 bits, d padded to 65,536, C = 0.1, beta = 0.

    It states scale 78450.76 and a scaled L2 bound of 8101.861, after widening C by 10^-4 against float error.
    """
    radius = 0.1 * 78450.76 * (1 + 1e-4)
    certain = radius + math.sqrt(65_536)
    assert certain == pytest.approx(8101.861, abs=1e-3)
    assert rounded_norm_bound_squared(7846, 65_536, beta=0) == math.floor((7846 + 256) ** 2)


def test_the_norm_bound_is_the_formula_of_kairouz_liu_steinke() -> None:
    radius, length, beta = 1000, 4096, math.exp(-0.5)
    expected = radius**2 + length / 4 + 1.0 * (radius + math.sqrt(length) / 2)
    assert rounded_norm_bound_squared(radius, length, beta) == math.floor(expected)
    assert rounded_norm_bound_squared(1, 4, 2**-20) == 9  # (1 + sqrt 4)^2 is the smaller one here


def test_rounding_is_unbiased() -> None:
    """Mean of 40,000 roundings of each value within 5.5 standard errors: false alarms below 10^-6 for 10."""
    values = np.linspace(-3, 3, 10, dtype=np.float32)
    vector = np.tile(values, 40_000)
    got = round_conditionally(vector, 1.5, radius=5000, norm_bound_squared=2**50, key=SEED)
    exact = values.astype(np.float64) * 1.5
    fraction = exact - np.floor(exact)
    error = np.sqrt(fraction * (1 - fraction) / 40_000)
    means = got.reshape(-1, 10).mean(axis=0)
    assert np.all(np.abs(means - exact) <= 5.5 * error + 1e-9)
    assert np.all((got == np.tile(np.floor(exact), 40_000)) | (got == np.tile(np.ceil(exact), 40_000)))


def test_rounding_draws_again_until_the_norm_bound_holds() -> None:
    """Sixteen halves: all sixteen round up with probability 2^-16, and a bound of 8 is met half the time."""
    vector = np.full(16, 0.5, np.float32)
    norms = []
    for index in range(200):
        key = index.to_bytes(32, "big")
        rounded = round_conditionally(vector, 1.0, radius=2, norm_bound_squared=8, key=key)
        norms.append(int(np.dot(rounded, rounded)))
    assert max(norms) == 8  # the condition binds
    assert min(norms) < 6  # and still leaves the rounding random


def test_an_unclipped_vector_is_never_rounded_beyond_the_bound() -> None:
    with pytest.raises(RoundingFailed):
        round_conditionally(np.full(4, 9.0, np.float32), 1.0, radius=20, norm_bound_squared=99, key=SEED)
