"""How unusual a machine's readings are: an autoencoder, whose error is the measure.

Trained to give back its input through a narrow middle, with the readings themselves as target. Where it
fails, the readings are not like those that it saw.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from models.architectures.architecture import Architecture
from models.manifest import InputSpec, TargetSpec

layers = tf.keras.layers

READINGS = 8
MIDDLE = 3
LABELS = tuple(f"reading {number}" for number in range(1, READINGS + 1))


def build() -> Any:
    """Readings (8,) to three numbers and back."""
    return tf.keras.Sequential(
        [
            layers.Input((READINGS,)),
            layers.Dense(16, activation="tanh", name="wide"),
            layers.Dense(MIDDLE, activation="tanh", name="middle"),
            layers.Dense(16, activation="tanh", name="wide-again"),
            layers.Dense(READINGS, name="readings"),
        ],
        name="anomaly",
    )


ARCHITECTURE = Architecture(
    name="anomaly",
    build=build,
    labels=LABELS,
    scaling=InputSpec(shape=(READINGS,), mean=(0.0,) * READINGS, std=(1.0,) * READINGS),
    loss="mean_squared_error",
    target=TargetSpec(shape=(READINGS,), dtype="float32", mean=(0.0,) * READINGS, std=(1.0,) * READINGS),
    optimizer="adam",
)
