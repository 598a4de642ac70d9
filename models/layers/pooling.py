"""Pooling over non-overlapping windows, and over everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

from models.layers import primitives
from models.layers.lowering import LoweredLayer
from models.layers.primitives import Tensor

keras = tf.keras.layers


class Pooling(LoweredLayer):
    """Maximum or average over windows that touch but do not overlap, along one or two axes."""

    handles = (keras.MaxPooling1D, keras.MaxPooling2D, keras.AveragePooling1D, keras.AveragePooling2D)

    def check(self) -> None:
        layer = self.layer
        self.refuse_unless(
            layer.data_format == "channels_last", "its data format is channels_first", "use channels_last"
        )
        self.refuse_unless(
            tuple(layer.strides) == tuple(layer.pool_size),
            f"its windows of {tuple(layer.pool_size)} move by {tuple(layer.strides)}",
            "use strides equal to pool_size",
        )
        self.refuse_unless(layer.padding == "valid", "it pads its input", "use padding='valid'")

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        largest = isinstance(self.layer, (keras.MaxPooling1D, keras.MaxPooling2D))
        pool = primitives.max_pool if largest else primitives.average_pool
        size = tuple(self.layer.pool_size)
        return pool(x, size) if len(size) == 2 else _over_image(lambda image: pool(image, (1, *size)), x)


class GlobalAverage(LoweredLayer):
    """Mean over all positions of each channel."""

    handles = (keras.GlobalAveragePooling1D, keras.GlobalAveragePooling2D)

    def check(self) -> None:
        _check_global(self)

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        return primitives.global_average(tf.expand_dims(x, 1) if len(x.shape) == 3 else x)


class GlobalMax(LoweredLayer):
    """Maximum over all positions of each channel."""

    handles = (keras.GlobalMaxPooling1D, keras.GlobalMaxPooling2D)

    def check(self) -> None:
        _check_global(self)

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        return primitives.global_max(tf.expand_dims(x, 1) if len(x.shape) == 3 else x)


def _check_global(lowered: LoweredLayer) -> None:
    layer = lowered.layer
    lowered.refuse_unless(
        layer.data_format == "channels_last", "its data format is channels_first", "use channels_last"
    )
    lowered.refuse_unless(not layer.keepdims, "it keeps the pooled axes", "use keepdims=False")


def _over_image(pool: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a two-dimensional pooling to x (n, t, c) as an image of height 1."""
    return tf.squeeze(pool(tf.expand_dims(x, 1)), [1])
