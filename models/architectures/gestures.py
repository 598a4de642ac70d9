"""Which gesture a hand makes, from 64 samples of acceleration: a small transformer encoder.

One block of self-attention (Vaswani et al. 2017, arXiv 1706.03762), normalised first, over patches of four
samples. The overlapping patches tell neighbours apart; there is no other code of position.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from models.architectures.architecture import Architecture
from models.manifest import InputSpec

layers = tf.keras.layers

SAMPLES, AXES, WIDTH = 64, 3, 16
LABELS = ("rest", "wave", "circle", "tap")


def build() -> Any:
    """An encoder over (64, 3) in g."""
    inputs = tf.keras.Input((SAMPLES, AXES))
    x = layers.Conv1D(WIDTH, 8, strides=4, padding="same", name="patches")(inputs)
    y = layers.LayerNormalization(name="even-1")(x)
    y = layers.MultiHeadAttention(2, WIDTH // 2, name="attention")(y, y)
    x = layers.Add(name="residual-1")([x, layers.Dropout(0.1, name="dropped")(y)])
    y = layers.LayerNormalization(name="even-2")(x)
    y = layers.Dense(2 * WIDTH, activation="gelu", name="wide")(y)
    x = layers.Add(name="residual-2")([x, layers.Dense(WIDTH, name="narrow")(y)])
    x = layers.GlobalAveragePooling1D(name="overall")(layers.LayerNormalization(name="even-3")(x))
    return tf.keras.Model(inputs, layers.Dense(len(LABELS), name="gesture")(x), name="gestures")


ARCHITECTURE = Architecture(
    name="gestures",
    build=build,
    labels=LABELS,
    scaling=InputSpec(shape=(SAMPLES, AXES), mean=(0.0,) * AXES, std=(1.0,) * AXES),
)
