"""Encodes one client's update as a noisy ring vector, and decodes the sum of many.

    update, metrics -> clip -> rotate -> scale -> round conditionally -> add this client's noise -> mod 2^b
    sum mod 2^b -> (central noise) -> centred lift -> unscale -> unrotate -> mean update, mean metrics

This is the distributed discrete mechanism of Kairouz, Liu, Steinke 2021 (arXiv 2102.06387, Algorithms 1
and 2) with the Skellam noise of Agarwal, Kairouz, Liu 2021 (arXiv 2110.04995) by default. The figures come
from `derive_encoding`; what a round spends is described by `protocol.dp.events`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from protocol import ring
from protocol.dp.adaptive import CLIP_VOTE, vote
from protocol.dp.clipping import clip, clip_factor, l2_norm
from protocol.dp.errors import NoiseKeyError, NonFiniteUpdate, TooFewSurvivors, UpdateShapeError
from protocol.dp.parameters import NoiseDistribution, PrivacyMode
from protocol.dp.rotation import rotate, unrotate
from protocol.dp.rounding import round_conditionally
from protocol.dp.sampling import IntegerSampler, discrete_gaussian_sampler, skellam_sampler
from protocol.dp.scaling import EncodingParameters, derive_encoding
from protocol.dp.tree import add_increment
from protocol.secagg.prg import derive_key

__all__ = ["EncodingParameters", "decode", "derive_encoding", "encode", "noise_sampler"]

_CHUNK = 1 << 16


def encode(
    update: NDArray[np.float32],
    metrics: Mapping[str, float],
    params: EncodingParameters,
    key: bytes,
) -> ring.RingVector:
    """Encodes one client's contribution to the sum, its noise share included.

    Guarantee: before the noise, the encoded integers have a squared L2 norm of at most
        `params.norm_bound_squared`, whatever the update holds, and in distributed and local mode independent
        noise of variance `params.local_variance` is added to every coordinate, metric slots included.
    Assumes: `key` is fresh for this round and is kept by nobody; the same key with two updates would show
        their difference to whoever sees both results.

    Args:
        update: local minus global parameters, float32, shape (d,); not changed.
        metrics: one finite number for every declared slot; clipped to its bound.
        params: from `derive_encoding`.
        key: 32 bytes of secret randomness.

    Returns:
        uint32, shape (params.length,), elements below 2^b.

    Raises:
        UpdateShapeError: the update or the metrics are not what the plan declares.
        NonFiniteUpdate: NaN or infinity in the update or the metrics.
    """
    privacy = params.privacy
    if update.dtype != np.float32 or update.shape != (params.dimension,):
        raise UpdateShapeError(f"need float32 ({params.dimension},), got {update.dtype} {update.shape}")
    vector = np.empty(params.length, np.float32)
    if privacy.adaptive is not None:
        metrics = {**metrics, CLIP_VOTE: vote(l2_norm(update), privacy.clip_norm)}
    vector[params.dimension :] = _metric_coordinates(metrics, params)
    clip(update, privacy.clip_norm, out=vector[: params.dimension])
    if privacy.rotation:
        rotate(vector, params.rotation_seed)
    # Clipping once more in float64 undoes what float32 rounding added, so that rounding starts within radius.
    factor = clip_factor(l2_norm(vector), params.total_clip_norm) * params.scale
    integers = round_conditionally(
        vector,
        factor,
        radius=params.radius,
        norm_bound_squared=params.norm_bound_squared,
        key=derive_key(key, purpose="dp/client-rounding"),
    )
    if params.local_variance > 0:
        _add_noise(integers, noise_sampler(params), derive_key(key, purpose="dp/client-noise"))
    elements = integers.view(np.uint32)  # two's complement is the residue mod 2^32, which 2^b divides
    return np.bitwise_and(elements, np.uint32(ring.modulus_mask(params.bits)), out=elements)


def decode(
    total: ring.RingVector,
    survivors: int,
    params: EncodingParameters,
    *,
    noise_key: bytes | None = None,
    after_leaf: int = 0,
) -> tuple[NDArray[np.float32], dict[str, float]]:
    """Decodes the sum of the survivors' vectors to the mean update and the mean metrics.

    In central mode the noise is added here, in the ring and before the lift: reduction mod 2^b is then
    post-processing of sum plus noise, so that an overflow costs utility and never privacy.

    Guarantee: in central mode nothing derived from the un-noised sum is returned.
    Assumes: `total` is the sum of exactly `survivors` encoded vectors; `noise_key` is fresh for this release
        and forgotten after it, or the secret key of the plan's noise tree.

    Args:
        total: uint32, shape (params.length,), elements below 2^b; not changed.
        survivors: how many vectors the sum holds.
        noise_key: 32 secret bytes in central mode, else None.
        after_leaf: with a noise tree, its last leaf that was released; 0 for none.

    Returns:
        The mean update, float32, shape (d,), and the mean of every metric by name, that of the votes on an
        adaptive clip norm included. With a noise tree the sum of updates is divided by the most clients that
        the round can have, whatever the survivors.

    Raises:
        TooFewSurvivors: fewer than the noise was sized for.
        NoiseKeyError: no key in central mode, or one in another mode, or a leaf that was released before.
        UpdateShapeError: a sum of another shape, or of more vectors than the ring was sized for.
        RingElementError: the sum is no vector of the ring.
    """
    if survivors < params.minimum_survivors:
        raise TooFewSurvivors(f"{survivors} survivors, the noise was sized for {params.minimum_survivors}")
    if survivors > params.maximum_clients:
        raise UpdateShapeError(f"{survivors} survivors, the ring was sized for {params.maximum_clients}")
    if (noise_key is not None) != (params.privacy.mode is PrivacyMode.CENTRAL):
        raise NoiseKeyError("a noise key belongs to central mode, and central mode to a noise key")
    ring.check_vector(total, params.bits)
    if total.shape != (params.length,):
        raise UpdateShapeError(f"the sum has shape {total.shape}, expected ({params.length},)")
    if noise_key is not None:
        noise = np.zeros(params.length, np.int32)
        tree = params.privacy.tree
        if tree is None:
            _add_noise(noise, noise_sampler(params), derive_key(noise_key, purpose="dp/central-noise"))
        else:
            add_increment(noise, noise_sampler(params), noise_key, after=after_leaf, leaf=tree.leaf)
        total = ring.add(total, noise.view(np.uint32), params.bits)
    vector = ring.centred(total, params.bits) / (params.scale * survivors)
    mean = vector.astype(np.float32)
    if params.privacy.rotation:
        unrotate(mean, params.rotation_seed)
    metrics = {
        slot.name: float(coordinate) * slot.bound / (slot.share * params.privacy.clip_norm)
        for slot, coordinate in zip(params.privacy.slots, mean[params.dimension :], strict=True)
    }
    update = mean[: params.dimension].copy()
    if params.privacy.tree is not None:
        # Divided by the same number in every round, or the noise of a node that goes is not what came.
        update *= np.float32(survivors / params.maximum_clients)
    return update, metrics


def noise_sampler(params: EncodingParameters) -> IntegerSampler:
    """Returns the sampler of this round's noise: a client's share, or the aggregator's noise in central mode.

    Raises:
        InvalidParameters: the mode has no noise.
    """
    variance = params.local_variance + params.central_variance  # at most one of them is not 0
    if params.privacy.noise is NoiseDistribution.SKELLAM:
        return skellam_sampler(variance)
    return discrete_gaussian_sampler(variance)


def _metric_coordinates(metrics: Mapping[str, float], params: EncodingParameters) -> list[float]:
    """Clips every metric to its bound and scales it to its share of the clip norm."""
    slots = params.privacy.slots
    if metrics.keys() != {slot.name for slot in slots}:
        raise UpdateShapeError(
            f"need the metrics {sorted(slot.name for slot in slots)}, got {sorted(metrics)}"
        )
    coordinates = []
    for slot in slots:
        value = metrics[slot.name]
        if not math.isfinite(value):
            raise NonFiniteUpdate(f"metric {slot.name} is NaN or infinite")
        clipped = max(-slot.bound, min(slot.bound, value))
        coordinates.append(clipped / slot.bound * slot.share * params.privacy.clip_norm)
    return coordinates


def _add_noise(integers: NDArray[np.int32], sampler: IntegerSampler, key: bytes) -> None:
    """Adds one noise value to every element in place; sums stay far below 2^31."""
    for start in range(0, integers.size, _CHUNK):
        chunk = integers[start : start + _CHUNK]
        chunk += sampler.sample(key, start, chunk.size)
