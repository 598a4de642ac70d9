"""The exported models that come with Covey, as files beside this module; reading them needs no TensorFlow.

`python -m models.export NAME --out models/zoo/NAME` makes them anew from `models.architectures`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from models.manifest import ModelManifest, describe
from models.weights import decode_weights

NAMES = ("digits", "watch")


@dataclass(frozen=True, eq=False)
class BundledModel:
    """Version 1 of a model: its manifest, graph and initial weights.

    Attributes:
        manifest: as in `manifest.json`.
        graph: bytes of `model.tflite`.
        weights: the vector in `weights.bin`, float32, shape (parameter_count,).
    """

    manifest: ModelManifest
    graph: bytes
    weights: NDArray[np.float32]


def load(name: str) -> BundledModel:
    """Read one of `NAMES`.

    Raises:
        KeyError: no such model.
        InvalidManifest: the manifest is damaged.
        InvalidWeights: the weights are not the manifest's.
        ValueError: the graph is not the manifest's.
    """
    if name not in NAMES:
        raise KeyError(f"no bundled model {name!r}, only {', '.join(NAMES)}")
    directory = files(f"{__name__}.{name}")
    manifest = ModelManifest.from_bytes((directory / "manifest.json").read_bytes())
    graph = (directory / "model.tflite").read_bytes()
    if describe(graph) != manifest.graph:
        raise ValueError(f"the graph of {name} is not the one of its manifest")
    return BundledModel(manifest, graph, decode_weights((directory / "weights.bin").read_bytes(), manifest))
