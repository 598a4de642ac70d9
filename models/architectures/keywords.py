"""Which word was spoken, from a second of sound as 49 frames of 10 mel-frequency cepstral coefficients.

A depthwise separable network like that of Zhang et al. 2017 ("Hello Edge", arXiv 1711.07128), with group in
place of batch normalisation.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from models.architectures.architecture import Architecture
from models.manifest import InputSpec

layers = tf.keras.layers

FRAMES, COEFFICIENTS = 49, 10
FILTERS, GROUPS, BLOCKS = 32, 4, 3
LABELS = (
    *("yes", "no", "up", "down", "left", "right"),
    *("on", "off", "stop", "go", "silence", "unknown"),
)


def build() -> Any:
    """Separable convolutions over (49, 10) coefficients."""
    inputs = tf.keras.Input((FRAMES, COEFFICIENTS))
    x = layers.Reshape((FRAMES, COEFFICIENTS, 1), name="image")(inputs)
    x = layers.Conv2D(FILTERS, (10, 4), strides=(2, 2), padding="same", use_bias=False, name="sounds")(x)
    x = layers.ReLU(name="sounds-on")(layers.GroupNormalization(GROUPS, name="sounds-even")(x))
    for block in range(1, BLOCKS + 1):
        x = layers.DepthwiseConv2D(3, padding="same", use_bias=False, name=f"deep-{block}")(x)
        x = layers.Conv2D(FILTERS, 1, use_bias=False, name=f"mix-{block}")(x)
        x = layers.ReLU(name=f"on-{block}")(layers.GroupNormalization(GROUPS, name=f"even-{block}")(x))
    x = layers.GlobalAveragePooling2D(name="overall")(x)
    return tf.keras.Model(inputs, layers.Dense(len(LABELS), name="word")(x), name="keywords")


ARCHITECTURE = Architecture(
    name="keywords",
    build=build,
    labels=LABELS,
    # What the layers give for 16 examples is 256 kB each, and stays in the cache of a small processor.
    train_batch_size=16,
    optimizer="adam",
    # Coefficients in the usual logarithmic scale: round figures, nobody's data was measured for them.
    scaling=InputSpec(shape=(FRAMES, COEFFICIENTS), mean=(0.0,) * COEFFICIENTS, std=(10.0,) * COEFFICIENTS),
)
