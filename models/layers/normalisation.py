"""Normalisation: over one example (trained), or by the fixed statistics of a pretrained backbone (frozen)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import tensorflow as tf

from models.layers import primitives
from models.layers.lowering import LoweredLayer
from models.layers.primitives import Gradient, Tensor, differentiable

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
            list(layer.axis) == [len(self.input_shape()) - 1], "it is not over the last axis", "use axis=-1"
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
        axis, last = self.layer.axis, len(self.input_shape()) - 1
        self.refuse_unless(
            axis in (-1, last, [-1], [last]),
            "it is not over the last axis alone",
            "use axis=-1, or GroupNormalization(groups=1) for a whole example",
        )

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        return self.scaled(values, primitives.normalise(x, self.layer.epsilon))


class GroupNormalisation(_Scaled):
    """Groups of channels over all positions of an example (Wu and He 2018, arXiv 1803.08494)."""

    handles = (keras.GroupNormalization,)

    def check(self) -> None:
        self.refuse_unless(self.layer.axis == -1, "it is not over the last axis", "use axis=-1")

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        groups = int(x.shape[-1]) if self.layer.groups == -1 else int(self.layer.groups)
        rest = list(values)
        factor = rest.pop(0) if self.layer.scale else None
        bias = rest.pop(0) if self.layer.center else None
        y = normalise_groups(self.image(x), groups, self.layer.epsilon, factor, bias)
        return tf.reshape(y, [-1, *x.shape[1:]]) if len(x.shape) != 4 else y

    def image(self, x: Tensor) -> Tensor:
        """x with all its positions as those of an image."""
        return x if len(x.shape) == 4 else tf.reshape(x, [-1, 1, math.prod(x.shape[1:-1]), x.shape[-1]])


def normalise_groups(
    x: Tensor, groups: int, epsilon: float, factor: Tensor | None, bias: Tensor | None
) -> Tensor:
    """x (n, h, w, c) normalised in groups of neighbouring channels, times a factor and plus a bias (c,).

    Everything but five passes over x, and seven backward, is of size (n, c): means over positions come first,
    those over a group's channels then. Either of factor and bias may be missing.
    """
    channels = int(x.shape[3])
    positions = float(x.shape[1] * x.shape[2])
    given = [part for part in (factor, bias) if part is not None]
    gamma = factor if factor is not None else tf.ones([1])

    def of_group(means: Tensor) -> Tensor:
        """The mean over each group's channels, for each channel: (n, 1, 1, c)."""
        if groups == channels:
            return means
        grouped = tf.reshape(means, [-1, groups, channels // groups])
        # Back to every channel by a product: broadcasting converts to a constant.
        wide = tf.reduce_mean(grouped, 2, keepdims=True) * tf.ones([channels // groups])
        return tf.reshape(wide, [-1, 1, 1, channels])

    @differentiable
    def run(x: Tensor, *given: Tensor) -> tuple[Tensor, Gradient]:
        centred = x - of_group(_mean(x))
        share = tf.math.rsqrt(of_group(_mean(centred * centred)) + epsilon)
        size = share * gamma
        y = centred * size

        def gradient(dy: Tensor) -> tuple[Tensor, ...]:
            each, along = _mean(dy), _mean(dy * centred)
            pull = share * share * share * of_group(along * gamma)
            dx = dy * size - centred * pull - share * of_group(each * gamma)
            sums = [along * share] if factor is not None else []
            sums += [each] if bias is not None else []
            return dx, *(tf.reduce_sum(part, [0, 1, 2]) * positions for part in sums)

        return y if bias is None else y + bias, gradient

    return run(x, *given)


def _mean(x: Tensor) -> Tensor:
    """Over positions: (n, 1, 1, c)."""
    return tf.reduce_mean(x, [1, 2], keepdims=True)
