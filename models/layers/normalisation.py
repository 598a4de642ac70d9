"""Normalisation: over one example (trained), or by the fixed statistics of a pretrained backbone (frozen)."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from models.layers import primitives
from models.layers.lowering import LoweredLayer
from models.layers.primitives import Tensor

keras = tf.keras.layers


class FrozenBatchNormalisation(LoweredLayer):
    """Batch normalisation by its stored statistics.

    With statistics of the batch, a device's update would carry those of its data, and the mean of many
    devices' statistics is nobody's.
    """

    handles = (keras.BatchNormalization,)

    def check(self) -> None:
        layer = self.layer
        self.refuse_unless(
            not layer.trainable,
            "its batch statistics would leak and do not average",
            "set trainable = False (pretrained), or use GroupNormalization or LayerNormalization",
        )
        self.refuse_unless(
            list(layer.axis) == [len(layer.input_shape) - 1], "it is not over the last axis", "use axis=-1"
        )

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        layer, rest = self.layer, list(values)
        gamma = rest.pop(0) if layer.scale else 1.0
        beta = rest.pop(0) if layer.center else 0.0
        mean, variance = rest
        factor = gamma * tf.math.rsqrt(variance + layer.epsilon)
        return primitives.add_bias(primitives.scale(x, factor), beta - mean * factor)


class _Scaled(LoweredLayer):
    def scaled(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        """Apply the trained scale and offset, as far as the layer has them."""
        rest = list(values)
        x = primitives.scale(x, rest.pop(0)) if self.layer.scale else x
        return primitives.add_bias(x, rest.pop(0)) if self.layer.center else x


class LayerNormalisation(_Scaled):
    """Every position of an example by itself (Ba et al. 2016, arXiv 1607.06450)."""

    handles = (keras.LayerNormalization,)

    def check(self) -> None:
        axis, last = self.layer.axis, len(self.layer.input_shape) - 1
        self.refuse_unless(
            axis in (-1, last, [-1], [last]),
            "it is not over the last axis alone",
            "use axis=-1, or GroupNormalization(groups=1) for a whole example",
        )

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        return self.scaled(values, primitives.normalise(x, [-1], self.layer.epsilon))


class GroupNormalisation(_Scaled):
    """Groups of channels over all positions of an example (Wu and He 2018, arXiv 1803.08494)."""

    handles = (keras.GroupNormalization,)

    def check(self) -> None:
        self.refuse_unless(self.layer.axis == -1, "it is not over the last axis", "use axis=-1")

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        channels = int(x.shape[-1])
        groups = channels if self.layer.groups == -1 else int(self.layer.groups)
        size = 1
        for length in x.shape[1:-1]:
            size *= int(length)
        split = tf.reshape(x, [-1, size, groups, channels // groups])
        even = primitives.normalise(split, [1, 3], self.layer.epsilon)
        return self.scaled(values, tf.reshape(even, [-1, *x.shape[1:]]))
