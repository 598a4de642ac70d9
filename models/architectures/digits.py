"""Which digit was written, from 8 x 8 pixels."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from models.architectures.architecture import Architecture
from models.datasets.digits import LABELS
from models.manifest import InputSpec

layers = tf.keras.layers


def build() -> Any:
    """Two convolutions over images (8, 8, 1)."""
    return tf.keras.Sequential(
        [
            layers.Input((8, 8, 1)),
            layers.Conv2D(8, 3, padding="same", activation="relu", name="strokes"),
            layers.MaxPooling2D(2, name="half"),
            layers.Conv2D(16, 3, padding="same", activation="relu", name="shapes"),
            layers.MaxPooling2D(2, name="quarter"),
            layers.Flatten(name="flat"),
            layers.Dense(len(LABELS), name="digit"),
        ],
        name="digits",
    )


ARCHITECTURE = Architecture(
    name="digits",
    build=build,
    labels=LABELS,
    scaling=InputSpec(shape=(8, 8, 1), mean=(8.0,), std=(8.0,)),
    example_gradients=True,
)
