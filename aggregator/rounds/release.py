"""From the sum of masked inputs to the mean update: the one place that sees an unmasked sum."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protocol import ring
from protocol.dp.events import DPEvent, event_for
from protocol.dp.mechanism import EncodingParameters, decode
from protocol.secagg.masking import apply_masks
from protocol.secagg.server_state import Recovered


@dataclass(frozen=True, eq=False)
class Release:
    """What a round gives away.

    Attributes:
        mean_update: float32, shape (d,).
        metrics: means over the survivors, by name.
        metric_noise: standard deviation of the noise in each of them.
        event: what the release spent.
    """

    mean_update: NDArray[np.float32]
    metrics: Mapping[str, float]
    metric_noise: Mapping[str, float]
    event: DPEvent

    @property
    def digest(self) -> str:
        """SHA-256 of the mean update and the metrics, in hexadecimal."""
        content = hashlib.sha256(self.mean_update.astype("<f4", copy=False).tobytes())
        content.update(json.dumps(dict(self.metrics), sort_keys=True).encode())
        return content.hexdigest()


def release(
    recovered: Recovered,
    total: NDArray[np.uint32],
    encoding: EncodingParameters,
    noise_key: bytes | None,
) -> Release:
    """Takes the masks off the sum, adds the central noise if the mode has one, and decodes.

    Guarantee: the un-noised sum of a central round exists in `total` only, which is overwritten.

    Args:
        recovered: the masks that stand in the sum.
        total: sum of the masked inputs, uint32, shape (encoding.length,); it is overwritten.
        encoding: of the round.
        noise_key: 32 fresh secret bytes in central mode, else None.
    """
    apply_masks(total, recovered.masks)
    np.bitwise_and(total, np.uint32(ring.modulus_mask(encoding.bits)), out=total)
    survivors = len(recovered.survivors)
    mean_update, metrics = decode(total, survivors, encoding, noise_key=noise_key)
    total.fill(0)
    return Release(mean_update, metrics, metric_noise(encoding, survivors), event_for(encoding, survivors))


def metric_noise(encoding: EncodingParameters, survivors: int) -> dict[str, float]:
    """Standard deviation of the noise in the mean of each metric; a rotation does not change it."""
    variance = survivors * encoding.local_variance + encoding.central_variance
    one = math.sqrt(variance) / (encoding.scale * survivors * encoding.privacy.clip_norm)
    return {slot.name: one * slot.bound / slot.share for slot in encoding.privacy.slots}
