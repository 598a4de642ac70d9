"""The digits model without a kink: tanh for ReLU, means for maxima."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

layers = tf.keras.layers


def build() -> Any:
    """Two convolutions over images (8, 8, 1), as in `models.architectures.digits`."""
    return tf.keras.Sequential(
        [
            layers.Input((8, 8, 1)),
            layers.Conv2D(8, 3, padding="same", activation="tanh", name="strokes"),
            layers.AveragePooling2D(2, name="half"),
            layers.Conv2D(16, 3, padding="same", activation="tanh", name="shapes"),
            layers.AveragePooling2D(2, name="quarter"),
            layers.Flatten(name="flat"),
            layers.Dense(10, name="digit"),
        ],
        name="smooth",
    )
