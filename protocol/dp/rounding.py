"""Conditional stochastic rounding: unbiased integers whose norm is bounded with certainty, not on average."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from protocol.dp.errors import RoundingFailed
from protocol.secagg.prg import Keystream, derive_key

BETA = 2.0**-20
"""Probability that one attempt misses the norm bound; also a bound on the bias that the condition adds."""

MAX_ATTEMPTS = 16
_CHUNK = 1 << 15


def rounded_norm_bound_squared(radius: int, length: int, beta: float = BETA) -> int:
    """Bounds the squared L2 norm of a rounded vector: the squared integer sensitivity.

    min{ r^2 + n/4 + sqrt(2 ln(1/beta)) (r + sqrt(n)/2), (r + sqrt(n))^2 } with r the norm before rounding
    (Kairouz, Liu, Steinke 2021, arXiv 2102.06387, Theorem 1 and Proposition 22, with gamma = 1).

    Args:
        radius: r, the clipped norm in units of the quantization step.
        length: n, elements of the vector.
        beta: probability that an unconditional rounding exceeds the first term; 0 leaves only the second.

    Returns:
        The bound rounded down, which loses nothing: a squared norm of integers is an integer.
    """
    certain = (radius + math.sqrt(length)) ** 2
    if beta == 0:
        return math.floor(certain)
    likely = radius**2 + length / 4
    likely += math.sqrt(2 * math.log(1 / beta)) * (radius + math.sqrt(length) / 2)
    return math.floor(min(likely, certain))


def round_conditionally(
    vector: NDArray[np.float32],
    factor: float,
    *,
    radius: int,
    norm_bound_squared: int,
    key: bytes,
) -> NDArray[np.int32]:
    """Rounds factor * vector stochastically to integers, again and again until the norm bound holds.

    Each coordinate goes to the integer below or above with the probabilities that keep its mean (granularity
    2^-32); a vector over the bound is drawn afresh (Kairouz, Liu, Steinke 2021, arXiv 2102.06387, Alg. 1).

    Guarantee: the result's squared L2 norm is at most `norm_bound_squared` and every coordinate lies in
        [-radius, radius], both checked on the integers themselves, whatever floating point did before.
    Assumes: |factor * vector| <= radius up to float rounding, so that one attempt fails with probability
        below beta.

    Args:
        vector: float32, shape (n,).
        factor: quantization steps per unit of the vector.
        radius: bound on the norm, and so on every coordinate, in quantization steps; at most 2^22.
        norm_bound_squared: from `rounded_norm_bound_squared`.
        key: 32 bytes, used for nothing else.

    Returns:
        int32, shape (n,).

    Raises:
        RoundingFailed: no attempt met the bound (probability beta^16 for a clipped vector).
    """
    integers = np.empty(vector.size, np.int32)
    for attempt in range(MAX_ATTEMPTS):
        stream = Keystream(derive_key(key, purpose="dp/rounding", context=attempt.to_bytes(4, "big")))
        if _attempt(vector, factor, radius, stream, integers) <= norm_bound_squared:
            return integers
    raise RoundingFailed(f"no rounding within squared norm {norm_bound_squared} in {MAX_ATTEMPTS} attempts")


def _attempt(
    vector: NDArray[np.float32],
    factor: float,
    radius: int,
    stream: Keystream,
    integers: NDArray[np.int32],
) -> int:
    """Writes one stochastic rounding to `integers` and returns its squared norm, exactly."""
    squares = 0
    for start in range(0, vector.size, _CHUNK):
        steps = vector[start : start + _CHUNK].astype(np.float64)
        steps *= factor
        steps += stream.words(start, steps.size) * 2.0**-32
        np.floor(steps, out=steps)
        # Only the last bit of a float64 product can carry a coordinate past the radius that bounds its norm.
        np.clip(steps, -radius, radius, out=steps)
        # A float64 sum of integer squares is exact below 2^53, and any bound is near 2^44.
        squares += int(np.dot(steps, steps))
        integers[start : start + _CHUNK] = steps
    return squares
