"""Pooling over windows, and over everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from models.layers.convolving import Pair
from models.layers.lowering import LoweredLayer
from models.layers.primitives import Tensor
from models.layers.windowed import average_pool, global_average, global_max, max_pool

keras = tf.keras.layers


class Pooling(LoweredLayer):
    """Maximum or average over windows along one or two axes, which may overlap."""

    handles = (keras.MaxPooling1D, keras.MaxPooling2D, keras.AveragePooling1D, keras.AveragePooling2D)

    def check(self) -> None:
        self.need_channels_last()

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        layer = self.layer
        flat = isinstance(layer, (keras.MaxPooling1D, keras.AveragePooling1D))
        pool = max_pool if isinstance(layer, (keras.MaxPooling1D, keras.MaxPooling2D)) else average_pool
        size, strides, padding = _pair(layer.pool_size), _pair(layer.strides), layer.padding.upper()
        if not flat:
            return pool(x, size, strides, padding)
        return tf.squeeze(pool(tf.expand_dims(x, 1), size, strides, padding), [1])


def _pair(values: Any) -> Pair:
    sizes = [int(values)] if isinstance(values, int) else [int(value) for value in values]
    return (1, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])


class GlobalPooling(LoweredLayer):
    """Mean or maximum over all positions of each channel."""

    handles = (
        keras.GlobalAveragePooling1D,
        keras.GlobalAveragePooling2D,
        keras.GlobalMaxPooling1D,
        keras.GlobalMaxPooling2D,
    )

    def check(self) -> None:
        self.need_channels_last()

    def forward(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        largest = isinstance(self.layer, (keras.GlobalMaxPooling1D, keras.GlobalMaxPooling2D))
        pool = global_max if largest else global_average
        y = pool(tf.expand_dims(x, 1) if len(x.shape) == 3 else x)
        if not self.layer.keepdims:
            return y
        return tf.reshape(y, [-1, *[1] * (len(x.shape) - 2), x.shape[-1]])
