"""The weights file: one flat little-endian float32 vector, and nothing else.

Importable on the device: numpy and the manifest only.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from models.manifest import FLOAT32_BYTES, ModelManifest


class InvalidWeights(ValueError):
    """A weights file, or a vector to be written as one, that is not what its manifest promises."""


def encode_weights(weights: NDArray[np.float32]) -> bytes:
    """The file of a weights vector.

    Args:
        weights: finite float32, shape (d,).

    Raises:
        InvalidWeights: another shape or dtype, empty, or a value that is not finite.
    """
    if weights.ndim != 1 or weights.size == 0 or weights.dtype != np.float32:
        raise InvalidWeights(f"weights are one float32 vector, not {weights.dtype} of shape {weights.shape}")
    if not np.isfinite(weights).all():
        raise InvalidWeights("a weight is not finite")
    return weights.astype("<f4").tobytes()


def entry_vectors(manifest: ModelManifest, whole: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """Shared and local parameters in one vector (d + k,), as `set_weights` takes them by name."""
    vectors = {"weights": whole[: manifest.parameter_count]}
    return vectors | ({"local": whole[manifest.parameter_count :]} if manifest.local_parameters else {})


def decode_local(data: bytes) -> NDArray[np.float32]:
    """The local parameters in a file of this device's own, float32, shape (k,).

    Raises:
        InvalidWeights: the file holds no whole number of them.
    """
    if len(data) % FLOAT32_BYTES:
        raise InvalidWeights(f"{len(data)} bytes are no float32 vector")
    return np.frombuffer(data, "<f4").astype(np.float32)


def decode_weights(data: bytes, manifest: ModelManifest) -> NDArray[np.float32]:
    """The vector in a weights file, checked against its manifest before it is used.

    Returns:
        Read-only float32, shape (parameter_count,).

    Raises:
        InvalidWeights: another size or digest than the manifest's, or a value that is not finite.
    """
    if len(data) != manifest.weights.size:
        raise InvalidWeights(f"the weights file has {len(data)} bytes, expected {manifest.weights.size}")
    if hashlib.sha256(data).hexdigest() != manifest.weights.sha256:
        raise InvalidWeights("the weights file has another digest than its manifest says")
    weights = np.frombuffer(data, dtype="<f4", count=len(data) // FLOAT32_BYTES).astype(
        np.float32, copy=False
    )
    if not np.isfinite(weights).all():
        raise InvalidWeights("a weight in the file is not finite")
    weights.flags.writeable = False
    return weights
