"""Which shoulder exercise a wrist is doing, from two seconds of inertial data."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from models.architectures.architecture import Architecture
from models.datasets.watch import CHANNELS, LABELS, WINDOW
from models.manifest import InputSpec

layers = tf.keras.layers


def build() -> Any:
    """1-D convolution over windows (100, 6) of acceleration in g and rotation rate in rad/s."""
    return tf.keras.Sequential(
        [
            layers.Input((WINDOW, CHANNELS)),
            layers.AveragePooling1D(2, name="halve"),
            layers.Conv1D(16, 5, activation="relu", name="short"),
            layers.AveragePooling1D(2, name="quarter"),
            layers.Conv1D(32, 5, activation="relu", name="long"),
            layers.GlobalMaxPooling1D(name="strongest"),
            layers.Dense(len(LABELS), name="exercise"),
        ],
        name="watch",
    )


ARCHITECTURE = Architecture(
    name="watch",
    build=build,
    labels=LABELS,
    scaling=InputSpec(
        shape=(WINDOW, CHANNELS),
        # Round figures for a wrist in exercise, in g and rad/s; nobody's data was measured for them.
        mean=(0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        std=(1.0, 0.5, 0.5, 1.0, 2.5, 1.0),
    ),
)
