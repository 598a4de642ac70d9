"""From the sum of masked inputs to the mean update: the one place that sees an unmasked sum."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protocol import ring
from protocol.dp.mechanism import EncodingParameters, decode
from protocol.secagg.masking import Mask, apply_masks
from protocol.secagg.server_state import Recovered

Unmask = Callable[[NDArray[np.uint32], Sequence[Mask]], None]
"""Does what `apply_masks` does to a whole vector, wherever it runs."""


@dataclass(frozen=True, eq=False)
class Release:
    """What a round, or one sub-cohort of it, gives away.

    Attributes:
        mean_update: float32, shape (d,).
        metrics: means over the survivors, by name.
        metric_noise: standard deviation of the noise in each of them.
    """

    mean_update: NDArray[np.float32]
    metrics: Mapping[str, float]
    metric_noise: Mapping[str, float]

    @property
    def digest(self) -> str:
        """SHA-256 of the mean update and the metrics, in hexadecimal."""
        content = hashlib.sha256(self.mean_update.astype("<f4", copy=False).tobytes())
        content.update(json.dumps(dict(self.metrics), sort_keys=True).encode())
        return content.hexdigest()


def together(releases: Iterable[Release], survivors: Sequence[int]) -> Release:
    """One release of the sums of several sub-cohorts: their means, each counted by its survivors.

    Args:
        releases: of one round, at least one; one is held in memory at a time, besides the result.
        survivors: of each of them.
    """
    mean: NDArray[np.float32] | None = None
    metrics: dict[str, list[float]] = {}
    noise: dict[str, list[float]] = {}
    for count, part in zip(survivors, releases, strict=True):
        weight = count / sum(survivors)
        vector = np.multiply(part.mean_update, np.float32(weight), out=part.mean_update)
        mean = vector if mean is None else np.add(mean, vector, out=mean)
        for name in part.metrics:
            metrics.setdefault(name, []).append(weight * part.metrics[name])
            noise.setdefault(name, []).append(weight * part.metric_noise[name])
    if mean is None:
        raise ValueError("there is no sum to release")
    return Release(
        mean,
        {name: math.fsum(parts) for name, parts in metrics.items()},
        {name: math.hypot(*parts) for name, parts in noise.items()},
    )


def release(
    recovered: Recovered,
    total: NDArray[np.uint32],
    encoding: EncodingParameters,
    noise_key: bytes | None,
    unmask: Unmask = apply_masks,
    *,
    after_leaf: int = 0,
) -> Release:
    """Takes the masks off the sum, adds the central noise if the mode has one, and decodes.

    Guarantee: the un-noised sum of a central round exists in `total` only, which is overwritten.

    Args:
        recovered: the masks that stand in the sum.
        total: sum of the masked inputs, uint32, shape (encoding.length,); it is overwritten.
        encoding: of the round.
        noise_key: 32 fresh secret bytes in central mode, or the key of its noise tree; else None.
        unmask: how the masks are taken off.
        after_leaf: with a noise tree, its last leaf that was released.
    """
    unmask(total, recovered.masks)
    np.bitwise_and(total, np.uint32(ring.modulus_mask(encoding.bits)), out=total)
    survivors = len(recovered.survivors)
    mean_update, metrics = decode(total, survivors, encoding, noise_key=noise_key, after_leaf=after_leaf)
    total.fill(0)
    return Release(mean_update, metrics, metric_noise(encoding, survivors))


def metric_noise(encoding: EncodingParameters, survivors: int) -> dict[str, float]:
    """Standard deviation of the noise in the mean of each metric, at most; a rotation does not change it."""
    variance = survivors * encoding.local_variance + encoding.central_draws * encoding.central_variance
    one = math.sqrt(variance) / (encoding.scale * survivors * encoding.privacy.clip_norm)
    return {slot.name: one * slot.bound / slot.share for slot in encoding.privacy.slots}
