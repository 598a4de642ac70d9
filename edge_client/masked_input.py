"""From a contribution to the bytes that leave the device: encoded, masked and bit-packed, slice by slice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edge_client.training import LocalUpdate
from protocol.dp.clipping import clip
from protocol.dp.mechanism import EncodingParameters, encode
from protocol.secagg.masking import Mask, masked_slices
from protocol.secagg.packing import SlicePacker
from protocol.secagg.prg import SLICE_WORDS


@dataclass(frozen=True)
class Contribution:
    """What this device adds to the sum, before clipping, noise and masking. It never leaves it as is.

    Attributes:
        vector: an update or an answer, finite float32, shape (d,).
        metrics: the metrics that there are, by name.
        local: the parameters that stay here after training, if the model has any.
    """

    vector: NDArray[np.float32]
    metrics: Mapping[str, float]
    local: NDArray[np.float32] | None = None


def contribution_of(update: LocalUpdate) -> Contribution:
    """An update with the metrics that a plan may ask for (`protocol.round_encoding.METRICS`)."""
    metrics = {
        "examples": float(update.example_count),
        "loss_before": update.loss_before,
        "loss_after": update.loss_after,
        "accuracy": update.accuracy,
    }
    return Contribution(update.delta, metrics, update.local)


def weighted(contribution: Contribution, clip_norm: float, weight: float) -> Contribution:
    """A contribution that counts less in the mean: clipped first, or a long update would make up for it.

    Args:
        contribution: of training.
        clip_norm: of the plan.
        weight: in (0, 1].
    """
    vector = np.empty_like(contribution.vector)
    clip(contribution.vector, clip_norm, out=vector)
    vector *= np.float32(weight)
    return replace(contribution, vector=vector)


def packed_slices(
    contribution: Contribution, encoding: EncodingParameters, masks: tuple[Mask, ...], noise_key: bytes
) -> Iterator[bytes]:
    """Yields the packed masked input in pieces; their concatenation is `ring.pack` of the whole vector.

    Args:
        contribution: the update or answer.
        encoding: of the round.
        masks: the client's own and its neighbours'.
        noise_key: 32 secret bytes, for this input only.

    Raises:
        PrivacyError: the vector is not finite, or not of the plan's shape; nothing was yielded.
    """
    available = contribution.metrics
    # A slot that this device has no metric for is refused with the plan; `encode` refuses what is missing.
    wanted = {
        slot.name: available[slot.name] for slot in encoding.privacy.metric_slots if slot.name in available
    }
    vector = encode(contribution.vector, wanted, encoding, noise_key)
    packer = SlicePacker(encoding.bits, min(len(vector), SLICE_WORDS))
    # Slices are multiples of `ring.GROUP`, so that each packs to whole bytes; the last may end anywhere.
    for _, part in masked_slices(vector, masks):
        yield packer.pack(part)
