"""L2 clipping: the one step that bounds what a single device can do to the sum."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from protocol.dp.errors import InvalidParameters, NonFiniteUpdate

_CHUNK = 1 << 16


def l2_norm(vector: NDArray[np.float32]) -> float:
    """Returns the Euclidean norm, accumulated in float64.

    Args:
        vector: float32, shape (n,).

    Raises:
        NonFiniteUpdate: an element is NaN or infinite.
    """
    squares = 0.0
    for start in range(0, vector.size, _CHUNK):
        chunk = vector[start : start + _CHUNK].astype(np.float64)
        squares += float(np.dot(chunk, chunk))
    # Squares of finite float32 values stay below 1.2e77, so only NaN or infinity can make the sum non-finite.
    if not math.isfinite(squares):
        raise NonFiniteUpdate("the vector holds NaN or infinity")
    return math.sqrt(squares)


def clip_factor(norm: float, bound: float) -> float:
    """Returns min(1, bound / norm), which scales a vector into the ball (Abadi et al. 2016, Algorithm 1).

    Raises:
        InvalidParameters: `bound` is not a positive finite number.
    """
    if not (math.isfinite(bound) and bound > 0):
        raise InvalidParameters(f"a clip norm is positive and finite, got {bound}")
    return 1.0 if norm <= bound else bound / norm


def clip(
    update: NDArray[np.float32], bound: float, *, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Scales `update` down to an L2 norm of at most `bound`; a shorter one is copied unchanged.

    Guarantee: the norm of the result is at most `bound` up to float32 rounding (relative 2^-23); the integer
        check of `protocol.dp.rounding` makes the bound exact in the ring.

    Args:
        update: float32, shape (d,).
        bound: C, in the unit of the parameters.
        out: where to write, float32, shape (d,).

    Returns:
        float32, shape (d,).

    Raises:
        NonFiniteUpdate: an element is NaN or infinite.
        InvalidParameters: `bound` is not a positive finite number.
    """
    factor = clip_factor(l2_norm(update), bound)
    # The product is taken in float64 and rounded once: for a huge update the factor has no float32 value.
    clipped = np.empty_like(update) if out is None else out
    return np.multiply(update, factor, out=clipped, dtype=np.float64, casting="same_kind")
