"""What a weather station measures next, from its last twelve readings: a gated recurrent unit."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from models.architectures.architecture import Architecture
from models.manifest import InputSpec, TargetSpec

layers = tf.keras.layers

STEPS = 12
LABELS = ("temperature", "humidity", "pressure")
# Round figures in degrees Celsius, per cent and hectopascals; nobody's data was measured for them.
MEANS, DEVIATIONS = (10.0, 60.0, 1013.0), (10.0, 20.0, 10.0)


def build() -> Any:
    """The reading after a window (12, 3)."""
    return tf.keras.Sequential(
        [
            layers.Input((STEPS, len(LABELS))),
            layers.GRU(12, name="memory"),
            layers.Dense(len(LABELS), name="next"),
        ],
        name="forecast",
    )


ARCHITECTURE = Architecture(
    name="forecast",
    build=build,
    labels=LABELS,
    scaling=InputSpec(shape=(STEPS, len(LABELS)), mean=MEANS, std=DEVIATIONS),
    loss="huber",
    target=TargetSpec(shape=(len(LABELS),), dtype="float32", mean=MEANS, std=DEVIATIONS),
    optimizer="adam",
)
