"""Clipping holds in ring arithmetic after rounding; sums decode to the plain mean within a stated bound."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from protocol import ring
from protocol.dp.mechanism import EncodingParameters, decode, derive_encoding, encode
from protocol.dp.parameters import MetricSlot, PrivacyMode, PrivacyParameters

SEED = b"a digest of the plan............"
VALUES = st.floats(allow_nan=False, allow_infinity=False, width=32)
SMALL = st.floats(min_value=-4, max_value=4, width=32)
METRIC = st.floats(min_value=-1e6, max_value=1e6)


def silent_encoding(dimension: int, clients: int, bits: int, clip_norm: float, *, rotation: bool,
                    slots: int = 1) -> EncodingParameters:  # fmt: skip
    """An encoding without noise, so that what clipping and rounding did can be seen."""
    privacy = PrivacyParameters(
        mode=PrivacyMode.NONE,
        clip_norm=clip_norm,
        noise_multiplier=0.0,
        delta=1e-5,
        bits=bits,
        rotation=rotation,
        metric_slots=tuple(MetricSlot(name=f"m{index}", bound=3.0) for index in range(slots)),
    )
    return derive_encoding(
        privacy,
        dimension=dimension,
        minimum_survivors=1,
        maximum_clients=clients,
        rotation_seed=SEED,
    )


@given(
    st.lists(st.one_of(VALUES, SMALL), min_size=1, max_size=70),
    st.integers(ring.MIN_BITS, 28),
    st.floats(1e-3, 1e3),
    st.booleans(),
    METRIC,
    st.binary(min_size=32, max_size=32),
)
@settings(max_examples=300)
def test_the_encoded_norm_never_exceeds_the_stated_sensitivity(
    elements: list[float], bits: int, clip_norm: float, rotation: bool, metric: float, key: bytes
) -> None:
    params = silent_encoding(len(elements), 2, bits, clip_norm, rotation=rotation)
    encoded = encode(np.array(elements, np.float32), {"m0": metric}, params, key)
    ring.check_vector(encoded, bits)
    integers = ring.centred(encoded, bits)
    assert int(np.dot(integers, integers)) <= params.norm_bound_squared
    assert np.abs(integers).max() <= params.radius
    # In the unit of the parameters: C, the metrics' share of it and what rounding may add, and no more.
    rounding = math.sqrt(params.norm_bound_squared) / params.scale
    assert rounding <= params.total_clip_norm * (1 + math.sqrt(params.length) / params.radius) * (1 + 1e-9)


def reference_mean(updates: NDArray[np.float32], clip_norm: float) -> NDArray[np.float64]:
    """The plain mean of clipped updates, in float64."""
    norms = np.linalg.norm(updates.astype(np.float64), axis=1, keepdims=True)
    factors = np.minimum(1, clip_norm / np.maximum(norms, 1e-300))
    return np.asarray((updates * factors).mean(axis=0))


@given(st.data(), st.integers(1, 8), st.integers(1, 90), st.integers(12, 28), st.booleans())
@settings(max_examples=150)
def test_sums_decode_to_the_plain_mean_within_the_rounding_bound(
    data: st.DataObject, clients: int, dimension: int, bits: int, rotation: bool
) -> None:
    seed = data.draw(st.integers(0, 2**32 - 1))
    spread = data.draw(st.sampled_from([1e-4, 0.1, 10.0]))
    updates = np.random.default_rng(seed).normal(0, spread, (clients, dimension)).astype(np.float32)
    metrics = data.draw(st.lists(st.floats(-3, 3), min_size=clients, max_size=clients))
    params = silent_encoding(dimension, clients, bits, 1.0, rotation=rotation)
    total = np.zeros(params.length, np.uint32)
    for index in range(clients):
        encoded = encode(updates[index], {"m0": metrics[index]}, params, bytes([index]) * 32)
        ring.add(total, encoded, bits, out=total)
    mean, means = decode(total, clients, params)
    # Every coordinate of every client moves by less than one step, so the mean does too, before unrotating.
    step = 1 / params.scale
    error = np.append(
        mean - reference_mean(updates, 1.0),
        (means["m0"] - np.mean(metrics)) * 0.1 / 3.0,
    )
    assert np.linalg.norm(error) <= step * math.sqrt(params.length) + 1e-5
    if not rotation:
        assert np.abs(error).max() <= step + 1e-6


@given(st.data(), st.integers(2, 6))
@settings(max_examples=30)
def test_the_decoded_mean_does_not_depend_on_masks_or_order(data: st.DataObject, clients: int) -> None:
    params = silent_encoding(20, clients, 16, 1.0, rotation=True)
    updates = np.random.default_rng(clients).normal(0, 0.1, (clients, 20)).astype(np.float32)
    encoded = [encode(u, {"m0": 1.0}, params, bytes([i]) * 32) for i, u in enumerate(updates)]
    plain = np.zeros(params.length, np.uint32)
    for vector in encoded:
        ring.add(plain, vector, 16, out=plain)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    masks = rng.integers(0, 2**16, (clients, params.length)).astype(np.uint32)
    masked = np.zeros(params.length, np.uint32)
    for index in data.draw(st.permutations(range(clients))):
        previous = masks[(index + 1) % clients]  # a ring of pairwise masks that cancel
        vector = ring.subtract(ring.add(encoded[index], masks[index], 16), previous, 16)
        ring.add(masked, vector, 16, out=masked)
    np.testing.assert_array_equal(masked, plain)


@given(st.floats(0.05, 5), st.integers(2, 50), st.integers(8, 32), st.integers(1, 2000), st.booleans())
def test_noise_is_never_below_the_planned_multiple_of_the_sensitivity(
    z: float, survivors: int, bits: int, dimension: int, rotation: bool
) -> None:
    from protocol.dp.errors import RingTooNarrow

    privacy = PrivacyParameters(
        mode=PrivacyMode.DISTRIBUTED, clip_norm=1.0, noise_multiplier=z, delta=1e-5, bits=bits,
        rotation=rotation, colluders=survivors // 3,
    )  # fmt: skip
    try:
        params = derive_encoding(privacy, dimension=dimension, minimum_survivors=survivors,
                                 maximum_clients=survivors + 3, rotation_seed=SEED)  # fmt: skip
    except RingTooNarrow:
        return
    honest = survivors - survivors // 3
    assert math.sqrt(honest * params.local_variance) >= z * math.sqrt(params.norm_bound_squared) * (1 - 1e-12)
    assert params.overflow_probability <= 2**-20
