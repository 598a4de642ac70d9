"""What is in a picture of 96 x 96 pixels: a MobileNetV2 that stays as it is, and a head that is trained.

Sandler et al. 2018 (arXiv 1801.04381), width 0.35. The backbone's 410,208 weights are constants of the graph,
so that only the head travels and is trained. Nothing is downloaded here: the backbone has random weights, and
whoever has pretrained ones loads them into `build(...)` before exporting.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from models.architectures.architecture import Architecture
from models.manifest import InputSpec

layers = tf.keras.layers

SIDE = 96
LABELS = ("nothing", "person", "animal", "vehicle")


def build(backbone_weights: str | None = None) -> Any:
    """A frozen backbone over (96, 96, 3) and a trainable head.

    Args:
        backbone_weights: file of Keras weights for the backbone without its top; random ones if None.
    """
    backbone = tf.keras.applications.MobileNetV2(
        input_shape=(SIDE, SIDE, 3), alpha=0.35, include_top=False, weights=backbone_weights, pooling="avg"
    )
    if backbone_weights is None:
        _calibrate(backbone)
    backbone.trainable = False
    inputs = tf.keras.Input((SIDE, SIDE, 3))
    x = layers.LayerNormalization(trainable=False, center=False, scale=False, name="even")(backbone(inputs))
    return tf.keras.Model(inputs, layers.Dense(len(LABELS), name="head")(x), name="pictures")


def _calibrate(backbone: Any) -> None:
    """Set the statistics of a random backbone by coloured noise, or its features would all but vanish."""
    random = np.random.default_rng(0)
    colours = random.uniform(-1, 1, (16, 1, 1, 3)) + random.normal(0, 0.3, (16, SIDE, SIDE, 3))
    for layer in backbone.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.0
    backbone(np.clip(colours, -1, 1).astype(np.float32), training=True)


ARCHITECTURE = Architecture(
    name="pictures",
    build=build,
    labels=LABELS,
    # Bytes of 0 to 255 to -1 to 1, as the backbone was trained.
    scaling=InputSpec(shape=(SIDE, SIDE, 3), mean=(127.5,) * 3, std=(127.5,) * 3),
    train_batch_size=8,
)
